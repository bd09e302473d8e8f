"""What a run survives: kill -9, faults of disk, memory, data and terminal, power cuts, damaged and hostile files."""

"""What `GPT` offers beside the network: loading a trained model, and text from it.

A mixin, so that `model.py` holds the network alone. Its imports are late because loading and generation build on the
model.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..data.tokenizers import Tokenizer
    from .model import GPT


class Pretrained:
    """`GPT.from_pretrained` and `GPT.generate`."""

    tokenizer: "Tokenizer | None" = None
    """The one that the model was trained with, where it came from disk."""

    @staticmethod
    def from_pretrained(folder: str | Path) -> "GPT":
        """The model in a folder, in float32 and evaluation mode on the CPU, with its tokenizer.

        Args:
            folder: a run (its newest checkpoint counts) or one of its checkpoints, or a GPT-2 in the format of transformers, as `gpt export` and
                `save_pretrained` write it.

        Raises:
            FileNotFoundError: the folder holds neither, or a file is missing from it.
            ValueError: a file in it is damaged, its tokenizer does not fit the model, or it is no GPT-2.
        """
        from .huggingface import import_model, import_tokenizer
        from .run import load_run

        folder = Path(folder)
        if (folder / "config.toml").is_file() or (folder / "manifest.json").is_file():
            run = load_run(folder)
            model, tokenizer = run.model, run.tokenizer
        elif (folder / "config.json").is_file():
            model, tokenizer = import_model(folder), import_tokenizer(folder)
        else:
            what = "has neither config.toml nor config.json" if folder.is_dir() else "is not a folder"
            raise FileNotFoundError(
                f"{folder} {what}; from_pretrained takes the folder of a run (`gpt train` makes one) or of a GPT-2 "
                "that `gpt export` or transformers' save_pretrained wrote"
            )
        model.tokenizer = tokenizer
        return model

    def generate(
        self,
        prompt: str | list[str] | Tensor = "",
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        num_return_sequences: int = 1,
        seed: int | None = None,
    ) -> Any:
        """Continue text, or token ids; `gpt.generate` has the functions beneath.

        Args:
            prompt: a text, several, or ids, (B, T) int64. An empty text begins a document.
            max_new_tokens: the most new tokens a row. Prompt and new tokens together may exceed the context.
            temperature: divides the logits; 0 takes the likeliest token (greedy).
            top_k: draw from this many likeliest tokens; 0: from all.
            top_p: draw from the likeliest tokens that together have this probability.
            repetition_penalty: above 1, tokens that occurred already become less likely.
            num_return_sequences: samples of each prompt.
            seed: of the draws; None: different ones each time.

        Returns:
            Each prompt with its continuation: a string for one sample of one text, else a list; for ids
            (B * num_return_sequences, T + max_new_tokens). The model ends a text where it writes end-of-text, and ids
            nowhere.

        Raises:
            ValueError: a setting that is not allowed, a prompt that does not fit the context or that the tokenizer
                cannot encode, or a text where the model has no tokenizer.
        """
        from .device import pick_dtype
        from .generate import MAX_SAMPLES, generate, generate_text

        model, samples = cast("GPT", self), num_return_sequences
        if not 1 <= samples <= MAX_SAMPLES:
            raise ValueError(
                f"num_return_sequences = {samples} is not allowed; it takes a whole number from 1 to {MAX_SAMPLES}"
            )
        settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        settings |= {"repetition_penalty": repetition_penalty, "seed": seed}
        settings["dtype"] = pick_dtype("auto", model.wte.weight.device)
        if isinstance(prompt, Tensor):
            if prompt.dim() != 2:
                raise ValueError(f"prompt has shape {tuple(prompt.shape)}; token ids take (B, T)")
            prompt = prompt.repeat_interleave(samples, 0)
            new = generate(model, prompt.tolist(), max_new_tokens, **settings)
            return torch.cat([prompt, prompt.new_tensor(new)], 1)
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer; set model.tokenizer, or give token ids")
        prompts = [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(samples)]
        new_texts = generate_text(model, self.tokenizer, prompts, max_new_tokens, **settings)
        texts = [text + new for text, new in zip(prompts, new_texts, strict=True)]
        return texts[0] if isinstance(prompt, str) and samples == 1 else texts

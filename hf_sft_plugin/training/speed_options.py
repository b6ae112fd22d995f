"""The settings that decide on speed and memory, and on nothing else."""

from dataclasses import dataclass, field
from typing import Any

# Settings that can be off, and what else they can be.
_SWITCHES = {
    "fused_head": "auto, on",
    "padding_free": "auto, on",
    "shared_prompts": "auto",
    "trained_positions_only": "auto",
    "fused_layers": "auto",
}


def check_switches(settings: Any) -> None:
    """Raises if something that has these settings has one to an impossible value.

    Args:
        settings: A config, or a trainer.

    Raises:
        ValueError: Says what is possible.
    """
    for name, others in _SWITCHES.items():
        value = getattr(settings, name)
        if value not in (*others.split(", "), "off"):
            raise ValueError(
                f"{name} is {value!r}; choose {others} or off. In YAML put quotes around on "
                "and off, which it otherwise reads as true and false."
            )


@dataclass
class SpeedOptions:
    """What a `MaskedSFTTrainer` does to be fast and small; the gradient is the same with each.

    The help text of each field is its documentation. `group_by_prompt` alone changes which rows
    share an optimizer step.

    Raises:
        ValueError: If a value is impossible; says what is possible.
    """

    fused_head: str = field(
        default="auto",
        metadata={
            "help": "Whether the loss is computed without holding the logits: 'auto' where the "
            "model allows it, 'on' (an error where it does not), 'off' (full logits).",
            "choices": ["auto", "on", "off"],
        },
    )
    padding_free: str = field(
        default="auto",
        metadata={
            "help": "Whether rows are laid end to end for the model instead of padded to one "
            "length: 'auto' where a test run proves that each row sees itself alone, 'on' (an "
            "error where it does not), 'off' (padded).",
            "choices": ["auto", "on", "off"],
        },
    )
    shared_prompts: str = field(
        default="auto",
        metadata={
            "help": "Whether rows of a micro-batch that begin with the same tokens, as several "
            "responses to one prompt do, run them once: 'auto' without padding, where a test run "
            "proves that nothing changes; 'off' never. See group_by_prompt.",
            "choices": ["auto", "off"],
        },
    )
    trained_positions_only: str = field(
        default="auto",
        metadata={
            "help": "Whether what the last layer does for the prediction at a position is left out "
            "where that is not trained: 'auto' without padding, where a test run proves that "
            "nothing changes; 'off' never.",
            "choices": ["auto", "off"],
        },
    )
    fused_layers: str = field(
        default="auto",
        metadata={
            "help": "Whether norms, gated MLPs and rotary embeddings run as one function each, "
            "which keeps nothing but its inputs: 'auto' where the model's code is known word for "
            "word, without torch_compile and DeepSpeed; 'off' never.",
            "choices": ["auto", "off"],
        },
    )
    group_by_prompt: bool = field(
        default=False,
        metadata={
            "help": "Whether rows with the same prompt follow each other, groups of them in random "
            "order, so that they share a batch. Which rows share an optimizer step is then another "
            "choice."
        },
    )
    max_tokens_per_microbatch: int | str | None = field(
        default="auto",
        metadata={
            "help": "The rows of an optimizer step run in as few micro-batches as this many tokens "
            "allow; which rows share a step, and so the gradient, stays as it is. 'auto': 4,096 on "
            "a CPU, 16,384 elsewhere, or as many as a batch has, where memory allows it. None: "
            "per_device_train_batch_size rows at a time."
        },
    )
    auto_gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "Whether gradient checkpointing is switched on where a step with the longest "
            "row alone is estimated to need more memory than there is. The gradient stays the "
            "same. Needs max_tokens_per_microbatch='auto'; not with FSDP or DeepSpeed."
        },
    )
    keep_freed_memory: bool = field(
        default=True,
        metadata={
            "help": "Whether training on a CPU has the process keep the memory that it frees, "
            "which is a good deal faster (glibc only). False leaves the allocator as it is."
        },
    )

    def __post_init__(self) -> None:
        """Checks the settings."""
        check_switches(self)
        tokens = self.max_tokens_per_microbatch
        if tokens not in (None, "auto") and type(tokens) is not int:
            # On a command line everything is text.
            if not str(tokens).isdecimal():
                raise ValueError(
                    f"max_tokens_per_microbatch is {tokens!r}; give a number of tokens, 'auto', or "
                    "None for per_device_train_batch_size rows at a time."
                )
            self.max_tokens_per_microbatch = int(str(tokens))
        if self.auto_gradient_checkpointing and self.max_tokens_per_microbatch != "auto":
            raise ValueError(
                "auto_gradient_checkpointing is set, but nothing is estimated, because "
                f"max_tokens_per_microbatch is {self.max_tokens_per_microbatch!r}. Set that to "
                "'auto', or activation_checkpointing to true."
            )

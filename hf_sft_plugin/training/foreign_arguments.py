"""Arguments that other trainers take: an answer for those who bring them along."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

_OF_TRAINER = {
    "tokenizer": "Pass the tokenizer as processing_class.",
    "formatting_func": "Rows are read by their columns, so that the response is known. Rename them "
    "(prompt_column, response_column or messages_column in MaskedSFTConfig), or apply your "
    "function first: dataset.map(lambda row: {'text': formatting_func(row)}), which trains "
    "everything.",
    "compute_loss_func": "The masked loss would never call it. loss_type, label_smoothing_factor, "
    "z_loss_coef and entropy_coef of MaskedSFTConfig change the loss of a token; for any other "
    "loss use a Trainer of transformers with DataCollatorForPromptResponse.",
    "quantization_config": "Load the model with it, or give the name of the model and "
    "model_init_kwargs={'quantization_config': ...} in MaskedSFTConfig.",
}
# Most are settings of TRL's SFTConfig; some were arguments of its SFTTrainer before.
_OF_CONFIG = {
    "dataset_text_field": "A column called 'text' is found by itself: "
    "dataset.rename_column(name, 'text'). All of it is trained; for responses only give columns "
    "'prompt' and 'response', or 'messages'.",
    "dataset_kwargs": "Rows are prepared by the settings of DataOptions; rows that have input_ids "
    "and labels are used as they are.",
    "max_seq_length": "It is called max_length.",
    "eos_token": "It is called stop_token.",
    "pad_token": "Set tokenizer.pad_token; without one the stop token pads, and is trained all "
    "the same.",
    "truncation_mode": "It is called overflow: keep_start, keep_end, keep_response and others.",
    "completion_only_loss": "Only responses are trained as it is; use_loss_mask=False trains all "
    "of each row.",
    "assistant_only_loss": "Only assistant turns are trained as it is; train_on='all' trains the "
    "others too.",
    "shuffle_dataset": "Rows are shuffled in each epoch; train_sampling_strategy='sequential' "
    "keeps their order.",
    "packing_strategy": "packing=True packs whole rows by best fit.",
    "eval_packing": "Evaluation data is never packed; its figures would be the same.",
    "activation_offloading": "Set activation_checkpointing=True and "
    "activation_checkpointing_kwargs={'offload': True}.",
    "trust_remote_code": "Set model_init_kwargs={'trust_remote_code': True}.",
    "router_aux_loss_coef": "Set it on the config of the model.",
}


def refuse_trainer_arguments(given: Mapping[str, Any], settings: Collection[str]) -> None:
    """Refuses arguments that `MaskedSFTTrainer` does not take.

    Args:
        given: Arguments and their values; None stands for one that was left out.
        settings: Names of the settings, which belong into the config.

    Raises:
        TypeError: If there is one; says what does the same here.
    """
    for name in (name for name, value in given.items() if value is not None):
        answer = f"Give it to the settings: MaskedSFTConfig({name}=...)."
        if name not in settings:
            answer = {**_OF_CONFIG, **_OF_TRAINER}.get(name, _nearest(name, settings))
        raise TypeError(f"MaskedSFTTrainer takes no argument '{name}'. {answer}")


def refuse_config_arguments(names: Collection[str], settings: Collection[str]) -> None:
    """Refuses settings that `MaskedSFTConfig` does not have.

    Args:
        names: Settings that were given.
        settings: Names of those that there are.

    Raises:
        TypeError: If there is one; says what does the same here.
    """
    for name in names:
        if name not in settings:
            answer = _OF_CONFIG.get(name, _nearest(name, settings))
            raise TypeError(f"MaskedSFTConfig has no setting '{name}'. {answer}")


def _nearest(name: str, names: Collection[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"Did you mean '{matches[0]}'?" if matches else "See help(MaskedSFTConfig) for them."

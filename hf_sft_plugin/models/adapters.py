"""LoRA and other PEFT adapters, put on a model before it is trained."""

import warnings

from peft import PeftConfig, PeftMixedModel, PeftModel, PeftType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, enable_full_determinism, set_seed


def seed_weights(args: TrainingArguments) -> None:
    """Seeds random numbers as a `Trainer` does when it is made, which comes too late for weights.

    Those of an adapter are drawn before, and those that a loaded model has in no file.
    """
    if args.full_determinism:
        enable_full_determinism(args.seed)
    else:
        set_seed(args.seed)


def add_adapter(
    model: PreTrainedModel | PeftModel | PeftMixedModel,
    peft_config: PeftConfig | None,
    *,
    is_trained: bool = True,
) -> PreTrainedModel | PeftModel:
    """Freezes a model and adds a trainable adapter; without a config the model stays as it is.

    Args:
        model: The base model.
        peft_config: For example a `peft.LoraConfig`.
        is_trained: Whether something in the model has to be trainable.

    Raises:
        ValueError: If the model already carries an adapter, if nothing in it would be trained, or
            if what is trained could not be saved.
    """
    if isinstance(model, PeftMixedModel):
        raise ValueError(
            "The model is a PeftMixedModel, which PEFT cannot save, so what is trained would be "
            "lost. Use a PeftModel, whose adapters are of one kind. A Trainer of your own with "
            "MaskedLossMixin in front of it trains a PeftMixedModel; how it is saved is then yours."
        )
    if peft_config is not None:
        # The second is how transformers marks adapters that it loaded itself.
        if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "The model already carries an adapter, and a peft_config would put a second one "
                "around it. Leave peft_config out to train the adapter that is there, or merge it "
                "first with model.merge_and_unload()."
            )
        with warnings.catch_warnings():
            # PEFT asks transformers 5.24 by the old name.
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")
            model = get_peft_model(model, peft_config)
    if is_trained and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter of the model requires a gradient, so nothing would be trained. A loaded "
            "adapter needs is_trainable=True in PeftModel.from_pretrained."
        )
    return model


def adapter_state(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The adapters of a model, and those of them that are active; changes when either does."""
    if not isinstance(model, PeftModel | PeftMixedModel):
        # What transformers loads by itself. Switching those changes no module that we hold on to.
        return tuple(getattr(model, "peft_config", ())), ()
    return tuple(model.peft_config), tuple(model.active_adapters)


def find_row_dependence(model: nn.Module) -> str | None:
    """How the active adapters of a model depend on where a row begins or ends; None if they do not.

    Such adapters start out without an effect, so that trying them would show nothing.
    """
    if not isinstance(model, PeftModel):
        return None
    for name in model.active_adapters:
        config = model.peft_config[name]
        if config.is_prompt_learning:
            return "the adapter puts virtual tokens before every row"
        if getattr(config, "alora_invocation_tokens", None) is not None:
            return "the adapter begins where its invocation tokens are in a row"
    return None


def find_checkpointing_problem(model: nn.Module | None) -> str | None:
    """Why gradient checkpointing cannot be used with the active adapters; None where it can."""
    if not isinstance(model, PeftModel):
        return None
    for name in model.active_adapters:
        config = model.peft_config[name]
        if config.peft_type in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE):
            return (
                "Gradient checkpointing leaves out the keys and values that the adapter puts "
                "before every row. Set activation_checkpointing (gradient_checkpointing) to false, "
                "or train an adapter that puts virtual tokens there, as prompt tuning does."
            )
        if getattr(config, "alora_invocation_tokens", None) is not None:
            return (
                "Under gradient checkpointing PEFT runs an adapter with invocation tokens for "
                "nothing but training, and neither evaluation nor a trial of the model could go "
                "between. Set activation_checkpointing (gradient_checkpointing) to false."
            )
    return None

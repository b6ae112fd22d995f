"""LoRA and other PEFT adapters, put on a model before it is trained."""

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


def add_adapter(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, *, is_trained: bool = True
) -> PreTrainedModel | PeftModel:
    """Freezes a model and adds a trainable adapter; without a config the model stays as it is.

    Args:
        model: The base model.
        peft_config: For example a `peft.LoraConfig`.
        is_trained: Whether something in the model has to be trainable.

    Raises:
        ValueError: If the model already carries an adapter, or if nothing in it would be trained.
    """
    if peft_config is not None:
        # The second is how transformers marks adapters that it loaded itself.
        if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "The model already carries an adapter, and a peft_config would put a second one "
                "around it. Leave peft_config out to train the adapter that is there, or merge it "
                "first with model.merge_and_unload()."
            )
        model = get_peft_model(model, peft_config)
    if is_trained and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter of the model requires a gradient, so nothing would be trained. A loaded "
            "adapter needs is_trainable=True in PeftModel.from_pretrained."
        )
    return model

"""The configs of Accelerate are read by Accelerate itself and mean what they say."""

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from engine_worker import launch_environment

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "recipes" / "accelerate"
NAMES = {
    "one_gpu": (DistributedType.NO, 1, "bf16"),
    "ddp": (DistributedType.MULTI_GPU, 2, "bf16"),
    "fsdp2": (DistributedType.FSDP, 2, "bf16"),
    "zero2": (DistributedType.DEEPSPEED, 2, "bf16"),
    "zero3": (DistributedType.DEEPSPEED, 2, "bf16"),
    # What has Accelerate start processes; that they compute on a CPU, the script is told.
    "cpu": (DistributedType.MULTI_GPU, 2, "no"),
}


def test_there_is_a_config_for_each_engine() -> None:
    assert {path.stem for path in CONFIGS.glob("*")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_read_by_accelerate(name: str) -> None:
    config: Any = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    found = config.distributed_type, config.num_processes, config.mixed_precision
    assert found == NAMES[name]
    assert config.use_cpu == (name == "cpu")


def test_fsdp2_gathers_a_layer_at_a_time_and_saves_a_whole_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in launch_environment("fsdp2").items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.cpu_offload is not True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_accumulation_and_clipping_from_the_trainer(stage: int) -> None:
    environment = launch_environment(f"zero{stage}")
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in environment
    assert "ACCELERATE_GRADIENT_CLIPPING" not in environment
    saves = environment.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false")
    assert (saves == "true") == (stage == 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_or_the_config_says_how_to_use_it(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"`{name}.yaml`" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")

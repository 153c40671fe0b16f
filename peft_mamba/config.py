"""`MambaLoraConfig`: PEFT's LoraConfig with a preset in place of target modules.

get_peft_model(model, MambaLoraConfig(preset="sll", r=16))
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from peft import LoraConfig, TaskType
from torch import nn

from .presets import check_preset, preset_modules


@dataclass
class MambaLoraConfig(LoraConfig):
    """A LoRA whose target modules are named by a preset of `peft_mamba.presets`, or as in any LoraConfig.

    It is of `peft_type` LORA, so every door of PEFT takes it. On a model it becomes a plain LoraConfig with explicit
    target modules, `model.peft_config[adapter]`: what is saved is an ordinary PEFT adapter, and one MambaLoraConfig
    serves any number of models. task_type is CAUSAL_LM unless given.

    Raises:
        PresetError: there is no such preset.
        ValueError: both a preset and target modules are given, or neither.
    """

    preset: str | None = field(
        default=None,
        metadata={"help": "Which layers to adapt: all, sll, w or not-w. Takes the place of target_modules."},
    )

    def __post_init__(self):
        if self.preset is not None:
            check_preset(self.preset)
            if self.target_modules is not None:
                raise ValueError(
                    f"preset={self.preset!r} names the target modules; give either it or "
                    f"target_modules={self.target_modules!r}."
                )
        elif self.target_modules is None:
            raise ValueError("Name the layers to adapt: a preset (all, sll, w, not-w) or target_modules.")
        super().__post_init__()
        if self.task_type is None:
            self.task_type = TaskType.CAUSAL_LM

    def resolve(self, model: nn.Module) -> LoraConfig:
        """The plain LoraConfig that this one is on `model`.

        Raises:
            PresetError: the model's family lacks the preset.
        """
        plain = self._plain()
        if self.preset is not None:
            plain.target_modules = set(preset_modules(model, self.preset))  # type: ignore[assignment]  # as PEFT has it
        return plain

    def _plain(self) -> LoraConfig:
        plain = LoraConfig(**{each.name: getattr(self, each.name) for each in fields(LoraConfig)})
        plain._custom_modules = self._custom_modules
        return plain

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write the adapter_config.json of a plain LoraConfig.

        Raises:
            ValueError: there is a preset, which has not met a model here, so there are no target modules to save.
        """
        if self.preset is not None:
            raise ValueError(
                f"preset={self.preset!r} becomes target modules on a model: pass this config to get_peft_model, and "
                "save what that returns."
            )
        self._plain().save_pretrained(save_directory, **kwargs)

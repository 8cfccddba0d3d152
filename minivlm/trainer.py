"""transformers' Trainer, where it saves our models whole.

The stock Trainer trains, evaluates and resumes them as it is. But it calls `save_pretrained` only of subclasses of
transformers' own `PreTrainedModel`; of any other model it writes the bare tensors, by the names they have in memory and
without config.json, and fails where two are tied. It reads no attribute that could change that, so this is a subclass
that overrides one method. Weighed and left: instances that pretend to be of a class that they are not of (pickling and
FSDP break), and replacing a name inside transformers (which others use too).
"""

from typing import Any

import transformers

from minivlm.models.base import VisionLanguageModel


class WholeCheckpoints:
    """A mixin for any trainer that is built on transformers' Trainer: `class Tuning(WholeCheckpoints, SFTTrainer)`.

    Checkpoints are what `save_pretrained` writes, so minivlm and transformers load them; adapters of PEFT stay PEFT's.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, VisionLanguageModel):
            return super()._save(output_dir, state_dict)
        super()._save(output_dir, {})  # everything but the weights, whose file is empty and is written over
        if self.args.should_save:
            model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)


class Trainer(WholeCheckpoints, transformers.Trainer):
    """`transformers.Trainer` with whole checkpoints."""

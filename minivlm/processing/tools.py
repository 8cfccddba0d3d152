"""Attributes that other tools expect of processors, under transformers' names; minivlm itself does not use them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from minivlm.modules.inputs import Inputs


class ImageProcessorTools:
    """A mixin of `ImageProcessor`."""

    model_input_names: ClassVar[list[str]]

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the name of the class."""
        return {**asdict(self), "image_processor_type": type(self).__name__}

    def preprocess(self, images: Any, **options: Any) -> Inputs:
        """The call, by another name."""
        return self(images, **options)


class ProcessorTools:
    """A mixin of `Processor`."""

    @property
    def model_input_names(self) -> list[str]:
        """Names of all inputs that a call can return for the model."""
        return [*self.image_processor.model_input_names, *self.tokenizer.model_input_names]

    def to_dict(self) -> dict[str, Any]:
        """The image processor's settings and the processor's own; without the tokenizer and the chat template."""
        settings = {name: getattr(self, name) for name in self.SETTINGS}
        return {"image_processor": self.image_processor.to_dict(), **settings, "processor_class": type(self).__name__}

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """`batch_decode`."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **options)

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[Sequence[int]] | None = None, **options: Any) -> Inputs:
        """num_image_tokens of images of these (height, width), and num_image_patches, the images or crops of each."""
        if image_sizes is None:
            return Inputs()
        processor, _ = self.for_call(options)
        counts = [processor.image_counts(height, width) for height, width in image_sizes]
        return Inputs(num_image_tokens=[c[0] for c in counts], num_image_patches=[c[1] for c in counts])

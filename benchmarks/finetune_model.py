"""The teacher with a linear classifier on its embedding: as it is trained, and as it is written for others to load."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.extract.pooling import pool
from pipeline.extract.teacher import Teacher, load_teacher
from pipeline.extract.tower import Tower
from pipeline.runtime import full_float32

CLASSIFIER = "classifier.safetensors"


class TeacherClassifier(nn.Module):
    """A teacher whose embeddings a new linear layer classifies; all of it learns."""

    def __init__(self, teacher: Teacher, num_classes: int) -> None:
        """Put the classifier on the embedding that `extract` takes.

        Args:
            teacher: on its device, in float32; trained in place.
            num_classes: of the data.

        Raises:
            PipelineError: its image processor does not work on tensors.
        """
        super().__init__()
        if getattr(teacher.preprocess.processor, "backend", None) != "torchvision":
            kind = type(teacher.preprocess.processor).__name__
            raise PipelineError(
                f"{teacher.info.name}: its image processor, {kind}, takes no tensors on the device. Choose a teacher "
                "whose processor is one of transformers' own, with torchvision as its backend."
            )
        self._teacher = teacher
        self.encoder: Any = teacher.model.requires_grad_(True)
        self.classifier = nn.Linear(teacher.info.embed_dim, num_classes, device=teacher.model.device)
        # At 0 (arXiv 2010.11929, section 3.2), so that its first gradients do not reach the encoder.
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def preprocess(self, planes: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 side side"]:
        """Resize and normalise images by the teacher's own image processor, on the device that they lie on.

        Args:
            planes: RGB, of any size.

        Returns:
            What the teacher takes, float32.
        """
        processor = self._teacher.preprocess.processor
        pixels: Tensor = processor(list(planes), return_tensors="pt", disable_grouping=False)["pixel_values"]
        return pixels

    def forward(self, pixels: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch classes"]:
        """Classify images.

        Args:
            pixels: as `preprocess` returns them.

        Returns:
            Logits.
        """
        output = self.encoder(pixel_values=pixels)
        logits: Tensor = self.classifier(pool(Tower(self.encoder), output, self._teacher.info.pooling))
        return logits

    def save(self, class_names: tuple[str, ...], folder: Path) -> None:
        """Write the teacher as `extract` and transformers load it; it is in evaluation mode afterwards.

        Where transformers' own classifier of this architecture is the same function, it is written as that; else as
        an encoder, with weight and bias of the classifier in a file beside it.

        Args:
            class_names: in the order of the classifier's rows.
            folder: exists.
        """
        self.eval()
        names = dict(enumerate(class_names))
        labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
        whole = self._as_transformers_has_it(labels)
        if whole is not None:
            whole.save_pretrained(folder)
        else:
            self.encoder.config.update(labels)
            self.encoder.save_pretrained(folder, state_dict=self._learned())
            weights = {name: weight.detach().cpu() for name, weight in self.classifier.state_dict().items()}
            save_file(weights, folder / CLASSIFIER)
        self._teacher.preprocess.processor.save_pretrained(folder)

    def check_saves(self, class_names: tuple[str, ...], folder: Path) -> None:
        """Write the teacher, load it as `extract` does, and compare: before hours are spent on it.

        Args:
            class_names: of the data.
            folder: exists, and is empty.

        Raises:
            PipelineError: another teacher comes back.
        """
        self.save(class_names, folder)
        again = load_teacher(str(folder), None, "auto", self.encoder.device, torch.float32)
        pixels = self.preprocess(_noise(self.encoder.device))
        same = again.info.pooling == self._teacher.info.pooling
        if not same or not torch.allclose(again.embed(pixels), self._teacher.embed(pixels), rtol=1e-3, atol=1e-4):
            raise PipelineError(
                f"{self._teacher.info.name}: other embeddings come back from what transformers writes of this "
                f"{self._teacher.info.architecture}, so that fine-tuning it would be in vain. Choose another teacher."
            )

    def _learned(self) -> dict[str, Tensor]:
        """Return the encoder's weights, without a pooler that nothing has gone through: it may be random."""
        pooled = self._teacher.info.pooling == "pooled"
        weights = self.encoder.state_dict()
        return {name: weight for name, weight in weights.items() if pooled or "pooler." not in name}

    @torch.no_grad()
    def _as_transformers_has_it(self, labels: dict[str, Any]) -> Any:
        """Return transformers' own classifier with these weights; none where there is none, or another function."""
        config = copy.deepcopy(self.encoder.config)
        config.update(labels)
        try:
            whole = transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        except ValueError:
            return None
        whole.eval().to(self.encoder.device)
        own = getattr(whole, "classifier", None)
        if not isinstance(own, nn.Linear) or own.weight.shape != self.classifier.weight.shape or own.bias is None:
            return None
        if whole.base_model.load_state_dict(self._learned(), strict=False).missing_keys:
            return None
        nn.init.normal_(own.weight, std=0.02)  # the trained ones may be all zeros still
        pixels = self.preprocess(_noise(self.encoder.device))
        with full_float32():  # as `embed` computes
            logits = whole(pixel_values=pixels).logits
        if not torch.allclose(logits, own(self._teacher.embed(pixels)), rtol=1e-3, atol=1e-4):
            return None
        own.load_state_dict(self.classifier.state_dict())
        return whole


def _noise(device: torch.device) -> UInt8[Tensor, "2 3 32 32"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8).to(device)

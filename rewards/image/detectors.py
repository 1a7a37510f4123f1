"""Boxes of a named object from a zero-shot detector in a local folder: Grounding DINO, OWL-ViT, OWLv2.

Needs torch, transformers and pillow (`pip install ".[train,flow]"`); imported when first used. Nothing is downloaded and no
code of the folder is run. A detector that cannot be loaded or fails raises: its answers are missing, not zero.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from rewards.score import BrokenRow

THRESHOLDS = {"grounding-dino": 0.3, "mm-grounding-dino": 0.3, "owlv2": 0.1, "owlvit": 0.1}  # least score of a box
IMAGES = 8  # in one forward pass

Box = tuple[float, float, float, float]


def detect(folder: str, images: Sequence[np.ndarray], phrases: Sequence[str | None]) -> list[list[tuple[Box, float]]]:
    """[(box in pixels, score in [0, 1])] of each image, best first; empty where nothing is found.

    images: (H, W, 3) in [0, 1], of any sizes. phrases: what to look for ("red cup"), one an image. Raises ValueError if the
    folder is missing or holds another kind of model, BrokenRow for a missing phrase.
    """
    import torch

    if not all(phrases):
        raise BrokenRow(f"object is missing; the detector {folder} needs a phrase")
    processor, model = _loaded(str(folder))
    kind = model.config.model_type
    dino = kind.endswith("grounding-dino")
    found = []
    for first in range(0, len(images), IMAGES):
        batch = images[first : first + IMAGES]
        inputs = processor(
            images=[Image.fromarray(np.rint(image * 255).astype(np.uint8)) for image in batch],
            text=[[phrase] for phrase in phrases[first : first + IMAGES]],
            padding=True if dino else "max_length",  # OWL joins texts of one length
            truncation=True,
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            outputs = model(**inputs)
        results = processor.post_process_grounded_object_detection(
            outputs,
            threshold=THRESHOLDS[kind],
            target_sizes=[image.shape[:2] for image in batch],
            **({"input_ids": inputs["input_ids"]} if dino else {}),
        )
        for result in results:
            pairs = zip(result["boxes"].tolist(), result["scores"].tolist(), strict=True)
            found.append(sorted(((tuple(box), score) for box, score in pairs), key=lambda pair: -pair[1]))
    return found


@lru_cache(maxsize=2)
def _loaded(folder: str):
    import torch
    from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f'detector={folder!r} has no config.json; give "palette" or the folder of a Grounding DINO or OWLv2 model'
        )
    local = {"local_files_only": True, "trust_remote_code": False}
    kind = AutoConfig.from_pretrained(folder, **local).model_type
    if kind not in THRESHOLDS:
        raise ValueError(f"detector={folder!r} holds a {kind} model; known: {', '.join(THRESHOLDS)}")
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder, **local).eval()
    return AutoProcessor.from_pretrained(folder, **local), model.to("cuda" if torch.cuda.is_available() else "cpu")

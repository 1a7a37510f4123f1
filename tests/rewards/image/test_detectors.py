"""Real Grounding DINO and OWLv2 models, tiny and with random weights: loading, batching, boxes in pixels, errors.

Whether a trained one finds a cup is not tested here.
"""

import importlib
import json

import numpy as np
import pytest

from rewards.image import detectors
from rewards.image.detectors import detect
from rewards.score import BrokenRow

IMAGES = [
    np.random.default_rng(i).random(shape).astype(np.float32) for i, shape in enumerate([(32, 40, 3), (32, 32, 3)])
]


@pytest.fixture(scope="module")
def owl(tmp_path_factory):
    import torch
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor

    pil = importlib.import_module("transformers.models.owlv2.image_processing_pil_owlv2")
    folder = tmp_path_factory.mktemp("owl")
    letters = list("abcdefghijklmnopqrstuvwxyz")
    names = [*letters, *[letter + "</w>" for letter in letters], "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names)}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": 0}
    torch.manual_seed(0)
    config = Owlv2Config(
        text_config=tower | ends | {"vocab_size": len(vocab), "max_position_embeddings": 16},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    images = pil.Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    Owlv2Processor(images, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    import torch
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoProcessor,
        SwinConfig,
    )

    pil = importlib.import_module("transformers.models.grounding_dino.image_processing_pil_grounding_dino")
    folder = tmp_path_factory.mktemp("dino")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "red", "disc", "blue", "square"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=128, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_indices=[2, 3, 4]
        ),
        text_config=BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
        ),
        num_queries=6,
        encoder_layers=1,
        decoder_layers=2,
        d_model=32,
        max_text_len=16,
        **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    images = pil.GroundingDinoImageProcessorPil(size={"shortest_edge": 128, "longest_edge": 160})
    GroundingDinoProcessor(images, BertTokenizer(vocab=str(folder / "vocab.txt"))).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["owl", "dino"])
def test_each_image_gets_boxes_in_its_own_pixels_best_first(kind, request, monkeypatch):
    folder = request.getfixturevalue(kind)
    monkeypatch.setattr(detectors, "THRESHOLDS", dict.fromkeys(detectors.THRESHOLDS, 0.0))
    together = detect(folder, IMAGES, ["red disc", "blue square disc"])
    assert len(together) == 2
    for boxes in together:
        scores = [score for _, score in boxes]
        assert scores == sorted(scores, reverse=True)
        assert len(boxes) >= 6
        assert all(0 <= score <= 1 for score in scores)
        corners = np.array([box for box, _ in boxes])
        assert (corners[:, :2] <= corners[:, 2:]).all()
        assert 4 < np.abs(corners).max() <= 100  # pixels, not shares
    if kind == "owl":  # Grounding DINO pads images to one size, which may move its boxes a little
        (alone,) = detect(folder, IMAGES[1:], ["blue square disc"])
        np.testing.assert_allclose([score for _, score in alone], [score for _, score in together[1]], atol=1e-5)


@pytest.mark.parametrize("kind", ["owl", "dino"])
def test_boxes_below_the_threshold_are_not_found(kind, request, monkeypatch):
    monkeypatch.setattr(detectors, "THRESHOLDS", dict.fromkeys(detectors.THRESHOLDS, 1.0))
    assert detect(request.getfixturevalue(kind), IMAGES, ["red disc"] * 2) == [[], []]


def test_many_images_are_seen_in_batches_with_the_same_answers(owl, monkeypatch):
    monkeypatch.setattr(detectors, "THRESHOLDS", {"owlv2": 0.0})
    images = [IMAGES[1] * np.float32(share) for share in (1.0, 0.5, 0.2)]
    whole = detect(owl, images, ["red", "blue", "red disc"])
    monkeypatch.setattr(detectors, "IMAGES", 2)
    assert [[round(score, 4) for _, score in boxes] for boxes in detect(owl, images, ["red", "blue", "red disc"])] == [
        [round(score, 4) for _, score in boxes] for boxes in whole
    ]


def test_a_detector_that_cannot_be_loaded_raises_and_names_the_folder(tmp_path):
    with pytest.raises(ValueError, match=r"gone.* has no config\.json"):
        detect(str(tmp_path / "gone"), IMAGES, ["red", "red"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="holds a bert model; known: grounding-dino"):
        detect(str(tmp_path), IMAGES, ["red", "red"])


def test_a_row_without_a_phrase_is_broken(owl):
    with pytest.raises(BrokenRow, match="object is missing"):
        detect(owl, IMAGES, ["red", None])

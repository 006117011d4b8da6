"""Bundle an ImageNet MobileNetV2, the backbone that knows photographs.

    python examples/convert_mobilenetv2.py --weights data/weights/mobilenetv2_100_tf_imagenet_fp16.safetensors \\
        --labels data/weights/imagenet_labels_coral.txt --photos data/photos_more --pets data/seg_pets

The weights are Google's `mobilenet_v2_1.0_224_quant.tflite` (google-coral/edgetpu, Apache-2.0) in timm's layout, dequantised, with the
batch normalisations folded into the convolutions. Folded ones have no statistics, so a network in training mode would normalise
activations that were never meant to be: here each layer gets the mean and variance that it sees on `--photos`, and the scale and
shift that undo them. What the network answers stays the same.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmkit.backbones import create_backbone
from mmkit.data import ImageTransform
from mmkit.data.images import SUFFIXES, load_image
from mmkit.data.listing import list_folder
from mmkit.storage import load_state
from mmkit.weights import WeightEntry, bundle

ARCHITECTURE = {"pad_type": "same"}
PREPROCESSING = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "input_size": [3, 224, 224],
    "interpolation": "bilinear",
    "crop_pct": 0.875,
}
CATS, DOGS = range(281, 286), range(151, 269)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="tensors in timm's layout")
    parser.add_argument("--labels", type=Path, required=True, help="'number  names' a line, background first")
    parser.add_argument("--photos", type=Path, required=True, help="any photos, to measure the statistics on")
    parser.add_argument("--pets", type=Path, required=True, help="index.csv and photos of cats and dogs, to score with")
    parser.add_argument("--dry-run", action="store_true", help="bundle nothing")
    args = parser.parse_args()

    model = create_backbone("timm:mobilenetv2_100", **ARCHITECTURE).eval()
    state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(args.weights).items()}
    load_state(model, state, source=str(args.weights))
    photos = [Path(p) for p in list_folder(args.photos, SUFFIXES).paths()][:128]
    batches = [prepared(photos[i : i + 32]) for i in range(0, len(photos), 32)]
    before = answers(model, batches)
    unfold(model, batches)
    model.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    same = (before.argmax(-1) == answers(model, batches).argmax(-1)).float().mean().item()
    score = pets_accuracy(model, args.pets)
    print(f"first answers unchanged: {same:.3f}; cat or dog: {score:.4f}")
    if args.dry_run:
        return
    bundle(
        WeightEntry(
            name="mobilenetv2",
            aliases=["mobilenetv2_100"],
            model="timm:mobilenetv2_100",
            config=ARCHITECTURE,
            summary="An ImageNet MobileNetV2, 3.5 M parameters, 224 px: names 1000 kinds of animals and things on photographs, one a "
            "picture, and is the backbone to start from for your own photographs. Scenes, people, drawings and fine print are out "
            "of its reach.",
            license="Apache-2.0",
            command=f"python examples/convert_mobilenetv2.py --weights data/weights/{args.weights.name} "
            f"--labels data/weights/{args.labels.name} --photos data/photos_more --pets data/seg_pets",
            data="trained by Google on ImageNet-1k (ILSVRC 2012); google-coral/edgetpu (5020de93) "
            "test_data/mobilenet_v2_1.0_224_quant.tflite, dequantised; normalisation statistics from 128 COCO photos",
            seed=0,
            score={"cat or dog, of 200 photos": round(score, 4)},
            extra={**PREPROCESSING, "class_names": class_names(args.labels)},
        ),
        model.state_dict(),
    )


def class_names(path: Path) -> list[str]:
    """The first name of each class; where two classes share it, all their names, and for the two cranes what they are."""
    full = [line.strip().split(maxsplit=1)[1] for line in path.read_text().splitlines() if line.strip()][1:]
    full[134], full[517] = "crane (bird)", "crane (machine)"
    short = [name.split(",")[0] for name in full]
    return [own if short.count(own) == 1 else name for own, name in zip(short, full, strict=True)]


def prepared(paths: list[Path]) -> Tensor:
    transform = ImageTransform.of(PREPROCESSING)
    return torch.stack([transform(load_image(path)) for path in paths])


@torch.inference_mode()
def answers(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([model(batch) for batch in batches])


def unfold(model: nn.Module, batches: list[Tensor]) -> None:
    """Give every batch normalisation the statistics of its input, and the scale and shift that keep its output."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].double()
        seen[layer].append((x.mean((0, 2, 3)), x.square().mean((0, 2, 3))))

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    answers(model, batches)
    for handle in handles:
        handle.remove()
    for layer in layers:
        mean, square = (torch.stack(part).mean(0) for part in zip(*seen[layer], strict=True))
        var = (square - mean.square()).clamp_min(1e-6).half().double()  # rounded as stored, so that the scale undoes it
        mean = mean.half().double()
        old = (layer.running_var.double() + layer.eps).sqrt()
        scale = layer.weight.double() / old
        with torch.no_grad():
            layer.bias.add_(scale * (mean - layer.running_mean.double()))
            layer.weight.copy_(scale * (var + layer.eps).sqrt())
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)


def pets_accuracy(model: nn.Module, folder: Path, count: int = 200) -> float:
    """How often the probabilities of all cats and of all dogs tell the animal."""
    with open(folder / "index.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows = rows[:: len(rows) // count][:count]
    batches = [prepared([folder / r["path"] for r in rows[i : i + 32]]) for i in range(0, count, 32)]
    shares = answers(model, batches).softmax(-1)
    cat = shares[:, list(CATS)].sum(-1) > shares[:, list(DOGS)].sum(-1)
    truth = torch.tensor([r["species"] == "cat" for r in rows])
    return (cat == truth).float().mean().item()


if __name__ == "__main__":
    main()

"""A run is its data: what decides the result is compared, by content, and what differs is named."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset, TensorDataset

from mmkit.adapters import apply_adapter, save_adapter
from mmkit.data import ImageTransform, open_dataset, split_dataset
from mmkit.errors import CheckpointError, InputError, RunDiffersError, StorageError
from mmkit.storage import folder_lock, read_tensors, sha256_file, write_safetensors
from mmkit.storage.runs import list_checkpoints, sealed
from mmkit.training import FitConfig, fit
from mmkit.training.digest import WHOLE_FILE, FileDigests, digest

CONFIG = {"epochs": 2, "batch_size": 8, "lr": 0.02, "progress": False, "device": "cpu"}


def points(n: int = 32, seed: int = 0) -> list[tuple[torch.Tensor, int]]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return [(row, int(row.sum() > 0)) for row in x]


def network(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def run(folder: Path, train=None, val=None, model=None, config=None, **options):  # type: ignore[no-untyped-def]
    train = points() if train is None else train
    return fit(
        model or network(), train, val, config=FitConfig(**(CONFIG | (config or {}))), output_dir=folder, **options
    )


def pictures(root: Path, swap: bool = False) -> Path:
    for i in range(12):
        name = ("cat", "dog")[(i + swap) % 2]
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
            root / name / f"{i}.png"
        )
    return root


def train_on_pictures(root: Path, folder: Path, size: int = 4, **options: object):  # type: ignore[no-untyped-def]
    train, val = split_dataset(open_dataset(root), 0.25)
    transform = ImageTransform(size)
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    return run(folder, train.with_transform(transform), val.with_transform(transform), model, **options)


# ------------------------------------------------------------------------------------------------------------ the data


def test_the_same_files_elsewhere_are_the_same_run(tmp_path: Path) -> None:
    root = pictures(tmp_path / "a")
    first = train_on_pictures(root, tmp_path / "run")
    shutil.move(root, tmp_path / "b")
    assert train_on_pictures(tmp_path / "b", tmp_path / "run").losses == first.losses


def rename_class(root: Path) -> None:
    (root / "cat").rename(root / "zebra")


def relabel(root: Path) -> None:
    (root / "cat" / "0.png").rename(root / "dog" / "0.png")


def repaint(root: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(root / "cat" / "0.png")


def add(root: Path) -> None:
    shutil.copy(root / "cat" / "0.png", root / "cat" / "99.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename_class, r"train: class 'cat' is now 'zebra'"),
        (relabel, r"cat/0\.png|dog/0\.png"),
        (repaint, r"of another content: cat/0\.png"),
        (add, r"new: cat/99\.png|99\.png"),
    ],
)
def test_changed_pictures_are_another_run_and_named(tmp_path: Path, change, words: str) -> None:  # type: ignore[no-untyped-def]
    root = pictures(tmp_path / "data")
    train_on_pictures(root, tmp_path / "run")
    change(root)
    with pytest.raises(RunDiffersError, match=words) as info:
        train_on_pictures(root, tmp_path / "run")
    assert "resume=False" in str(info.value)
    assert "\n" not in str(info.value)
    assert train_on_pictures(root, tmp_path / "run", config={"resume": False}).steps > 0
    train_on_pictures(root, tmp_path / "run")


def test_a_file_changed_in_place_with_its_old_time_and_size_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"a" * 100)
    old = file.stat()
    stamp = [old.st_size, old.st_mtime_ns, old.st_ctime_ns]
    before = FileDigests()(str(file))
    assert FileDigests({str(file): [*stamp, "known"]})(str(file)) == "known"
    file.write_bytes(b"b" * 100)
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert FileDigests({str(file): [*stamp, before]})(str(file)) != before


def test_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"a")
    files = FileDigests()
    files(str(file))
    assert not files.used  # it was changed just now and may change again within one tick of the clock
    later = os.stat(file).st_ctime_ns + 10**10
    monkeypatch.setattr("time.time_ns", lambda: later)
    files = FileDigests()
    before = files(str(file))
    monkeypatch.setattr("mmkit.training.digest._file_digest", lambda *a: pytest.fail("read again"))
    assert FileDigests(files.used)(str(file)) == before


def test_a_large_file_counts_by_blocks_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    file, found = tmp_path / "a.bin", set()
    for place in (None, 0, WHOLE_FILE // 2, WHOLE_FILE + (8 << 20) - 1):
        with open(file, "wb") as f:
            f.truncate(WHOLE_FILE + (8 << 20))
            if place is not None:
                f.seek(place)
                f.write(b"x")
        found.add(FileDigests()(str(file)))
    assert len(found) >= 3


class Shifted:
    """Reads from public lists, and shifts."""

    def __init__(self, images, labels, shift: float = 0.0) -> None:  # type: ignore[no-untyped-def]
        self.images, self.labels, self.shift, self.epoch = images, labels, shift, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        return self.images[index] + self.shift, self.labels[index]


class Hidden:
    """Shows nothing; its examples must be fetched."""

    def __init__(self, seed: int) -> None:
        self._x = torch.randn(32, 6, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        return self._x[index] + torch.rand(()), int(self._x[index].sum() > 0)


class Named(Hidden):
    """Says itself what counts."""

    def __init__(self, seed: int, version: str) -> None:
        super().__init__(seed)
        self._version = version

    def identity(self) -> dict[str, str]:
        return {"version": self._version}


x, y = torch.stack([p[0] for p in points()]), [p[1] for p in points()]
PAIRS = {
    "one tensor of a list": (points(), [*points()[:5], (torch.zeros(6), points()[5][1]), *points()[6:]], "example 5"),
    "one label of a list": (
        points(),
        [*points()[:5], (points()[5][0], 1 - points()[5][1]), *points()[6:]],
        r"example 5 was",
    ),
    "the order": (points(), points()[::-1], "train"),
    "tensors": (TensorDataset(x, torch.tensor(y)), TensorDataset(x + 1, torch.tensor(y)), "tensors"),
    "a subset": (Subset(points(), range(20)), Subset(points(), range(1, 21)), "train"),
    "an attribute": (Shifted(x, y), Shifted(x, y, 0.5), "shift: 0.0 is now 0.5"),
    "hidden data": (Hidden(0), Hidden(1), "the examples are others"),
    "what it says itself": (Named(0, "v1"), Named(0, "v2"), "identity"),
}


@pytest.mark.parametrize("what", PAIRS)
def test_every_kind_of_data_set_counts(tmp_path: Path, what: str) -> None:
    first, second, words = PAIRS[what]
    result = run(tmp_path, first)
    assert run(tmp_path, first).losses == result.losses
    with pytest.raises(RunDiffersError, match=words):
        run(tmp_path, second)


def test_the_epoch_a_data_set_was_told_does_not_count(tmp_path: Path) -> None:
    data = Shifted(x, y)
    run(tmp_path, data)
    data.epoch = 7
    assert run(tmp_path, data).stopped == "finished"


def test_another_validation_set_is_another_run(tmp_path: Path) -> None:
    run(tmp_path, val=points(10, 5))
    with pytest.raises(RunDiffersError, match=r"val: .*example"):
        run(tmp_path, val=points(10, 6))
    with pytest.raises(RunDiffersError, match="val:"):
        run(tmp_path)


def test_another_transform_is_another_run(tmp_path: Path) -> None:
    root = pictures(tmp_path / "data")
    train_on_pictures(root, tmp_path / "run")
    with pytest.raises(RunDiffersError, match=r"transform: ImageTransform\(.*is now ImageTransform\("):
        train_on_pictures(root, tmp_path / "run", size=6)


# -------------------------------------------------------------------------------------------- functions, model, settings


def weighted(weight: float):  # type: ignore[no-untyped-def]
    def loss_fn(model: nn.Module, batch):  # type: ignore[no-untyped-def]
        return weight * nn.functional.cross_entropy(model(batch[0]), batch[1])

    return loss_fn


def smoothed(model: nn.Module, batch, smooth: float):  # type: ignore[no-untyped-def]
    return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=smooth)


FUNCTIONS = {
    "closure": (weighted(1.0), weighted(2.0)),
    "partial": (functools.partial(smoothed, smooth=0.1), functools.partial(smoothed, smooth=0.2)),
    "code": (
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]) * 2,
    ),
    "default": (None, weighted(1.0)),
}


@pytest.mark.parametrize("what", FUNCTIONS)
def test_another_loss_is_another_run(tmp_path: Path, what: str) -> None:
    first, second = FUNCTIONS[what]
    run(tmp_path, loss_fn=first)
    run(tmp_path, loss_fn=first)
    with pytest.raises(RunDiffersError, match="loss_fn"):
        run(tmp_path, loss_fn=second)


def test_another_metric_is_another_run(tmp_path: Path) -> None:
    def metric(value: float):  # type: ignore[no-untyped-def]
        return lambda model, loader: {"accuracy": value}

    run(tmp_path, val=points(8), metrics_fn=metric(1.0))
    with pytest.raises(RunDiffersError, match="metrics_fn"):
        run(tmp_path, val=points(8), metrics_fn=metric(0.5))


def test_a_loss_that_holds_the_trained_model_may_be_resumed(tmp_path: Path) -> None:
    model = network()
    options = {"model": model, "loss_fn": lambda _, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])}
    run(tmp_path, **options)
    assert run(tmp_path, **options).stopped == "finished"


def test_other_frozen_weights_are_another_run(tmp_path: Path) -> None:
    def adapted(seed: int, **settings: object) -> dict[str, object]:
        model = network(seed)
        return {"model": model, "adapter": apply_adapter(model, "ssf", targets=("0",), **settings)}

    first = run(tmp_path, **adapted(1))
    assert run(tmp_path, **adapted(1)).losses == first.losses
    with pytest.raises(RunDiffersError, match="frozen weights"):
        run(tmp_path, **adapted(2))
    with pytest.raises(RunDiffersError, match="adapter"):
        run(tmp_path, **adapted(1, modules_to_save=("2",)))


def test_further_facts_count_under_their_name(tmp_path: Path) -> None:
    run(tmp_path, identity={"start": "a.pth"})
    with pytest.raises(RunDiffersError, match=r"start: 'a\.pth' is now 'b\.pth'"):
        run(tmp_path, identity={"start": "b.pth"})


@pytest.mark.slow
def test_the_digest_of_a_function_is_the_same_in_another_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from functools import partial\nfrom mmkit.training.digest import FileDigests, digest\n"
        "from torchvision import transforms as T\nSCALE = 3\n"
        "def helper(x):\n    return x * SCALE\n"
        "class Lossy:\n    def __init__(self):\n        self.names = {'a', 'b', 'c'}\n"
        "    def __call__(self, x):\n        return [helper(v) for v in x]\n"
        "print(digest([Lossy(), partial(helper, 2), T.Compose([T.Resize(3), T.ToTensor()]), lambda x: x + 1], FileDigests()))\n"
    )
    found = {
        subprocess.run(
            [sys.executable, str(script)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    before = found.pop()
    script.write_text(script.read_text().replace("SCALE = 3", "SCALE = 4"))
    assert before != subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout


def test_values_that_hold_themselves_have_a_digest() -> None:
    value: list[object] = [1]
    value.append(value)
    assert len(digest(value, FileDigests())) == 32


# ------------------------------------------------------------------------------------------------------- more epochs


def test_a_finished_run_can_be_given_more_epochs(tmp_path: Path) -> None:
    rates: list[float] = []
    first = run(tmp_path, val=points(8))
    longer = run(tmp_path, val=points(8), config={"epochs": 4}, on_step=lambda info: rates.append(info.lr))
    assert (longer.stopped, longer.steps) == ("finished", 2 * first.steps)
    assert longer.losses[: first.steps] == first.losses
    assert len(longer.history) == 4
    planned: list[float] = []
    run(tmp_path / "long", val=points(8), config={"epochs": 4}, on_step=lambda info: planned.append(info.lr))
    assert rates == planned[first.steps :]  # the learning rate of the longer schedule at that step
    with pytest.raises(RunDiffersError, match="epochs: 4 is now 3"):
        run(tmp_path, val=points(8), config={"epochs": 3})


def test_with_a_constant_rate_more_epochs_are_one_long_run(tmp_path: Path) -> None:
    model, other = network(), network()
    run(tmp_path / "a", model=model, config={"schedule": "constant"})
    run(tmp_path / "a", model=network() and model, config={"schedule": "constant", "epochs": 3})
    run(tmp_path / "b", model=other, config={"schedule": "constant", "epochs": 3})
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_an_unfinished_run_keeps_its_length(tmp_path: Path) -> None:
    count = iter(range(100))
    run(tmp_path, should_stop=lambda: next(count) > 2)
    with pytest.raises(RunDiffersError, match=r"epochs: 2 is now 4 \(only a finished run"):
        run(tmp_path, config={"epochs": 4})


# --------------------------------------------------------------------------------------- folders, locks, damaged states


@pytest.mark.slow
def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from mmkit.storage import folder_lock\n"
         "with folder_lock(sys.argv[1]):\n    print('held', flush=True); sys.stdin.read()", str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(InputError, match=f"process {holder.pid}"):
        run(tmp_path)
    holder.kill()
    holder.wait()
    assert run(tmp_path).stopped == "finished"
    with folder_lock(tmp_path):
        pass  # given back


def test_the_folder_stays_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    result = run(Path("out"), on_step=lambda info: os.chdir(tmp_path / "elsewhere"))
    assert result.output_dir == tmp_path / "out"
    assert list_checkpoints(tmp_path / "out" / "checkpoints")
    assert not (tmp_path / "elsewhere" / "out").exists()


def edit(state: dict, **changes: object) -> dict:
    return sealed({k: v for k, v in {**state, **changes}.items() if v is not None})


DAMAGES = {
    "truncated": lambda text, state: text[: len(text) // 2],
    "empty": lambda text, state: "",
    "a list": lambda text, state: "[]",
    "a flipped digit": lambda text, state: text.replace('"step": 8', '"step": 9'),
    "no progress": lambda text, state: edit(state, progress=None),
    "no run": lambda text, state: edit(state, run=None),
    "a wrong run": lambda text, state: edit(state, run=[1]),
    "progress of other fields": lambda text, state: edit(state, progress={"step": 1}),
    "a wrong type": lambda text, state: edit(state, progress={**state["progress"], "history": "none"}),
    "no optimiser": lambda text, state: edit(state, optimizer={}),
    "fewer files": lambda text, state: edit(state, files={}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    model = network()
    whole = run(tmp_path, model=model)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1] / "state.json"
    found = DAMAGES[damage](newest.read_text(), json.loads(newest.read_text()))
    newest.write_text(found if isinstance(found, str) else json.dumps(found))
    again = network()
    with pytest.warns(UserWarning, match="Passing over a damaged checkpoint"):
        assert run(tmp_path, model=again).losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("tensor", ["nan", "foreign", "no optimiser tensors"])
def test_tensors_of_another_kind_give_way_to_the_ones_before(tmp_path: Path, tensor: str) -> None:
    whole = run(tmp_path)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    name = "optimizer.safetensors" if "optimiser" in tensor else "weights.safetensors"
    content = read_tensors(newest / name)
    if tensor == "nan":
        content["model.0.weight"][0, 0] = float("nan")
    elif tensor == "foreign":
        content = {"other": torch.zeros(3)}
    else:
        content = {"nothing/exp_avg": torch.zeros(3)}
    write_safetensors(newest / name, content)
    state = json.loads((newest / "state.json").read_text())
    state["files"][name] = sha256_file(newest / name)
    (newest / "state.json").write_text(json.dumps(sealed(state)))
    with pytest.warns(UserWarning, match="Passing over a damaged checkpoint"):
        assert run(tmp_path).losses == whole.losses


def test_without_any_usable_state_the_run_starts_over_as_it_began(tmp_path: Path) -> None:
    whole = run(tmp_path)
    for folder in list_checkpoints(tmp_path / "checkpoints"):
        (folder / "state.json").write_text("{")
    with pytest.warns(UserWarning, match="Passing over"):
        assert run(tmp_path).losses == whole.losses
    for folder in list_checkpoints(tmp_path / "checkpoints"):
        (folder / "state.json").write_text("{")
    with pytest.warns(UserWarning, match="Passing over"), pytest.raises(CheckpointError, match="no readable"):
        run(tmp_path / "other", config={"resume": str(tmp_path)})


def test_left_overs_of_a_killed_run_are_cleaned_at_the_start(tmp_path: Path) -> None:
    run(tmp_path)
    half = tmp_path / "checkpoints" / ".step_00000099.tmp"
    half.mkdir()
    run(tmp_path)  # it is finished: nothing is saved any more
    assert not half.exists()


@pytest.mark.parametrize("place", ["file", "file/below", "n" * 300])
def test_a_folder_that_cannot_be_is_one_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written") as info:
        run(tmp_path / place)
    assert "\n" not in str(info.value)
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_fills_up_leaves_the_checkpoints_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    real = os.fsync

    def fsync(handle: int) -> None:
        if list_checkpoints(tmp_path / "run" / "checkpoints"):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(StorageError, match="disk is full"):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]
    assert run(tmp_path / "run").losses == whole.losses


# --------------------------------------------------------------------------------------------------------- best and last


def test_a_metric_of_nan_is_never_the_best(tmp_path: Path) -> None:
    values = iter([float("nan"), 0.5, float("nan"), 0.4])
    result = run(
        tmp_path, val=points(8), config={"epochs": 4}, metrics_fn=lambda model, loader: {"accuracy": next(values)}
    )
    assert result.best_metrics == {"accuracy": 0.5}
    assert result.metrics == {"accuracy": 0.4}
    never = run(tmp_path / "b", val=points(8), metrics_fn=lambda model, loader: {"accuracy": float("nan")})
    assert never.best_metrics == {}


def test_the_summary_names_best_and_last_and_what_they_were_measured_on(tmp_path: Path) -> None:
    result = run(tmp_path / "a", val=points(8))
    summary = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert (summary["best"], summary["last"]) == (result.best_metrics, result.metrics)
    assert summary["measured on"] == "the validation data"
    run(tmp_path / "b")
    assert "training data" in json.loads((tmp_path / "b" / "metrics.json").read_text())["measured on"]


class Hides(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Keeps its examples in a private attribute beside a public one."""

    def __init__(self, examples: list[tuple[torch.Tensor, int]]) -> None:
        self._examples, self.flag = examples, 1

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self._examples[i]


def test_examples_behind_private_attributes_count(tmp_path: Path) -> None:
    run(tmp_path, Hides(points()))
    run(tmp_path, Hides(points()))
    with pytest.raises(RunDiffersError, match="train"):
        run(tmp_path, Hides(points(seed=1)))
    with pytest.raises(RunDiffersError, match="train"):
        run(tmp_path, Subset(Hides([(x, 1 - y) for x, y in points()]), range(32)))


def test_the_methods_an_example_goes_through_count(tmp_path: Path) -> None:
    class Loads(torch.utils.data.Dataset):  # type: ignore[type-arg]
        size = 32

        def __init__(self) -> None:
            self.kind = "points"

        def __len__(self) -> int:
            return 32

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            return self.load(i)

        def load(self, i: int) -> tuple[torch.Tensor, int]:
            return points()[i]

    run(tmp_path, Loads())

    def load(self: Loads, i: int) -> tuple[torch.Tensor, int]:
        x, y = points()[i]
        return -x, y

    load.__qualname__ = Loads.load.__qualname__
    Loads.load = load  # type: ignore[method-assign]
    with pytest.raises(RunDiffersError, match="code"):
        run(tmp_path, Loads())


def test_layers_without_tensors_count(tmp_path: Path) -> None:
    run(tmp_path, model=nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 2)))
    for other in (nn.Dropout(0.5), nn.Tanh()):
        with pytest.raises(RunDiffersError, match="model"):
            run(tmp_path, model=nn.Sequential(nn.Linear(6, 8), other, nn.Linear(8, 2)))


def test_arrays_of_every_type_have_a_digest() -> None:
    arrays = [
        np.array(["2020"], dtype="datetime64[D]"),
        np.zeros(2, [("a", "i4")]),
        np.array([1, None], object),
        np.array("x"),
    ]
    assert len({digest(a, FileDigests()) for a in arrays}) == len(arrays)


def test_a_damaged_log_is_no_obstacle_and_a_folder_of_its_name_is_told(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "log.csv").write_bytes(b"\xff\x00\n1,2,3\n")
    assert run(tmp_path).steps == 8
    (tmp_path / "log.csv").unlink(missing_ok=True)
    (tmp_path / "log.csv").mkdir()
    with pytest.raises(StorageError, match=r"log\.csv"):
        run(tmp_path)


def test_a_run_does_not_go_into_a_folder_that_holds_an_adapter(tmp_path: Path) -> None:
    model = network()
    adapter = apply_adapter(model, "ssf")
    save_adapter(adapter, tmp_path)
    with pytest.raises(InputError, match="holds an adapter"):
        run(tmp_path, model=model, adapter=adapter)
    assert not (tmp_path / "checkpoints").exists()

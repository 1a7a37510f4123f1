"""The run folder: everything one run leaves behind, safe against crashes, second processes and mix-ups.

    config.yaml         resolved configuration, no secrets     metrics.jsonl   one JSON object per log, with `step`
    rollouts.parquet/   step-000012.parquet, ...; one dataset  checkpoints/    checkpoint-12/, ...
    model/ samples/ eval.json report.html summary.json         seconds.json    of each part, over all processes
    before.json report.json    kept evaluation and figures     .lock           owner's pid; marks a run folder

`RunFolder(path)` looks; `RunFolder.open(path, config)` owns: it creates or resumes, and holds the lock until closed.
Every file is complete or absent: written beside its place, flushed to disk, then renamed over it. Only metrics.jsonl is
appended to; a line cut by a crash is dropped. JSON is strict: NaN and infinities are written as null, read as NaN.
A full or read-only disk ends the run in one sentence, WriteFailed, whoever was writing: this file, torch or safetensors.

`make_folder` does the same for the folders that runs share: offline data and warm starts.

Not covered: file systems without flock (some network mounts), and a process that writes without opening.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

if TYPE_CHECKING:
    import pyarrow

SECRET = re.compile(r"(?:key|token|secret|password|passwd|credentials?)[_\d]*$")
VOCABULARY = re.compile(r"(?:^|_)(?:pad|eos|bos|unk|mask|sep|cls|image|audio|video)_token$")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RunRefused(ValueError):
    """The folder may not be used this way; the message says why and how to go on."""


class WriteFailed(ValueError):
    """Something could not be written; the message names the folder, the cause and how to go on."""


class RunFolder:
    """One run's files below `path`. Readers work on any run; use `open` to write."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._lock: int | None = None

    @classmethod
    def open(cls, path: str | os.PathLike, config: Mapping, fresh: bool = False) -> Self:
        """Create the run, or resume it when it exists; `fresh` deletes an existing one first.

        config: the resolved configuration; plain YAML types only.
        Raises RunRefused for a secret in the config, a folder that is not a run, one that another process has open, or
        one whose config differs (naming the keys); WriteFailed if nothing can be written there.
        """
        refuse_secrets(config)
        run = cls(path)
        with _writing(run.path):
            if run.path.exists() and not run.path.is_dir():
                raise RunRefused(f"{run.path} is a file; choose another folder with RUN=<name>")
            run.path.mkdir(parents=True, exist_ok=True)
            names = {entry.name for entry in run.path.iterdir()}
            if not names <= {".lock", ".config.yaml.part"} and not {".lock", "config.yaml"} <= names:
                raise RunRefused(f"{run.path} is not empty and is not a run folder; choose another with RUN=<name>")
            run._take_lock()
            try:
                if fresh:
                    run._clear()
                run._settle(config)
                run.truncate_after(math.inf)
            except BaseException:
                run.close()
                raise
        return run

    def close(self) -> None:
        """Release the lock; harmless when there is none."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raises WriteFailed in place of an error of whoever could not write; nothing half-written stays to fill the disk."""
        failure = write_failure(error, self.path)
        if failure and self._lock is not None:
            with contextlib.suppress(OSError):
                self.last_checkpoint()
                for part in self.path.glob(".*.part"):
                    _delete(part)
        self.close()
        if failure:
            raise failure from error

    # ---------------------------------------------------------------- files

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write `path/name` whole or not at all; missing folders are made. Returns the file's path."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")  # hidden: a reader of the folder as a dataset skips it
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        return target

    def write_made(self, name: str, make: Callable[[Path], None]) -> Path:
        """Like `write_bytes`, of a file or a folder that `make` writes at the path it is given; it ends like `name`."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}")
        _remove(part)
        try:
            make(part)
            _flush(part)
            _remove(target)
            part.rename(target)
        except BaseException:
            _remove(part)
            raise
        return target

    def write_text(self, name: str, text: str) -> Path:
        return self.write_bytes(name, text.encode("utf-8", "replace"))

    def write_json(self, name: str, value: Any) -> Path:
        return self.write_text(name, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @property
    def config(self) -> dict:
        """The configuration the run was started with; {} when there is none."""
        try:
            return yaml.safe_load((self.path / "config.yaml").read_text("utf-8")) or {}
        except FileNotFoundError:
            return {}

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").exists()

    # ---------------------------------------------------------------- metrics

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl. Several lines may share a step (training and evaluation)."""
        line = json.dumps({"step": int(step), **plain(metrics)}, ensure_ascii=False, allow_nan=False)
        with (self.path / "metrics.jsonl").open("ab") as file:
            file.write(line.encode("utf-8", "replace") + b"\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl in order; null becomes NaN and a line that a crash cut or tore is left out."""
        try:
            lines = (self.path / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append({k: math.nan if v is None else v for k, v in json.loads(line).items()})
        return found

    # ---------------------------------------------------------------- rollouts

    def log_rollouts(self, step: int, columns: Mapping[str, Sequence]) -> Path:
        """Write the rollouts of one step as one part of rollouts.parquet, replacing a part of the same step.

        columns: equally long lists: prompt_id, prompt, completion (text; None is allowed), advantage, keep, reward,
        `reward/<name>` (numbers; NaN = not applicable or not scored), `reason/<name>` (text); others as they are.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        length = len(next(iter(columns.values())))
        arrays = {"step": pa.array([int(step)] * length, pa.int64())}
        for name, values in columns.items():
            if len(values) != length:
                raise ValueError(f"rollout column {name} has {len(values)} values, the first column has {length}")
            if name in ("prompt_id", "prompt", "completion") or name.startswith("reason/"):
                arrays[name] = pa.array([_text(v) for v in values], pa.string())
            elif name in ("advantage", "keep", "reward") or name.startswith("reward/"):
                arrays[name] = pa.array([math.nan if v is None else float(v) for v in values], pa.float64())
            else:
                arrays[name] = pa.array(plain(list(values)))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(arrays), sink, compression="zstd")
        return self.write_bytes(f"rollouts.parquet/step-{int(step):06d}.parquet", sink.getvalue().to_pybytes())

    def read_rollouts(self, last: int | None = None) -> "pyarrow.Table | None":
        """Rollouts as one table in step order, all or of the `last` logged steps; None when there are none."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        parts = self._parts()
        parts = parts if last is None else parts[-last:]
        tables = [pq.ParquetFile(part).read() for _, part in parts]
        return pa.concat_tables(tables, promote_options="permissive") if tables else None

    # ---------------------------------------------------------------- resuming

    def truncate_after(self, step: float) -> None:
        """Forget what was logged after `step` (and a line cut by a crash), so that a resumed run writes it once."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        text = "".join(json.dumps(plain(line), ensure_ascii=False, allow_nan=False) + "\n" for line in kept)
        self.write_text("metrics.jsonl", text)
        for at, part in self._parts():
            if at > step:
                part.unlink()

    def last_checkpoint(self) -> Path | None:
        """Newest complete checkpoints/checkpoint-N: trainer_state.json, written last, parses, and no tensor file is cut.

        A process that is killed leaves what it wrote; a machine that loses power leaves files empty or cut, in any order.
        The owner of the folder also deletes the incomplete ones.
        """
        best = None
        for _, folder in _numbered(self.path / "checkpoints", r"checkpoint-(\d+)"):
            if _is_whole(folder):
                best = folder
            elif self._lock is not None:
                shutil.rmtree(folder)
        return best

    # ---------------------------------------------------------------- inside

    def _parts(self) -> list[tuple[int, Path]]:
        return _numbered(self.path / "rollouts.parquet", r"step-(\d+)\.parquet")

    def _take_lock(self) -> None:
        def refuse(owner: str) -> None:
            raise RunRefused(
                f"{self.path} is in use by another process ({owner}); wait for it, end it, or choose RUN=<another name>"
            )

        self._lock = _lock(self.path / ".lock", refuse)

    def _clear(self) -> None:
        """Delete all but the lock; interrupted, it leaves a recognised run, unfinished and without checkpoints."""
        order = {"summary.json": 0, "checkpoints": 1, "config.yaml": 3}
        for entry in sorted(self.path.iterdir(), key=lambda entry: order.get(entry.name, 2)):
            if entry.name != ".lock":
                _delete(entry)

    @property
    def _begun(self) -> bool:
        """Whether any work is kept here; before that (a config that was refused, a wrong path) any config may enter."""
        left = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")}
        return bool(left - {"config.yaml", "metrics.jsonl"} or self.read_metrics())

    def _settle(self, config: Mapping) -> None:
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        if not (self.path / "config.yaml").exists() or not self._begun:
            self.write_text("config.yaml", text)
            return
        old, new = dict(_leaves(self.config)), dict(_leaves(yaml.safe_load(text)))
        missing = object()
        changed = [k for k in {**old, **new} if old.get(k, missing) != new.get(k, missing)]
        if changed:
            shown = [f"{k}: {old.get(k, '(absent)')} -> {new.get(k, '(absent)')}" for k in changed[:8]]
            more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
            raise RunRefused(
                f"{self.path} holds a run with another config ({'; '.join(shown)}{more}). "
                "Use RUN=<another name> to keep both, or FRESH=1 to delete the old run and start again"
            )


def make_folder(target: Path, make: Callable[[Path], None], say: Callable[[str], Any]) -> None:
    """Make the folder `target`, whole or not at all, unless it is there. Of several processes one makes it, the others wait.

    make: makes and fills the folder it is given, which is renamed when whole. say: is told what is waited for.
    Raises WriteFailed.
    """
    if target.exists():
        return
    part = target.with_name(f".{target.name}.part")
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(
            target.with_name(f".{target.name}.lock"), lambda owner: say(f"{owner} is making {target}; waiting for it")
        )
    try:
        if target.exists():  # made while we waited
            return
        with _writing(target):
            if part.exists():
                shutil.rmtree(part)
        make(part)
        with _writing(target):
            _flush(part)
            part.rename(target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if failure := write_failure(error, target):
            raise failure from error
        raise
    finally:
        os.close(lock)


def write_failure(error: BaseException | None, path: Path) -> WriteFailed | None:
    """What to say if `error` means that something below `path` could not be written, by whatever library; else None."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in FULL | {errno.EROFS}:
        return _failure(path, error.errno)
    if type(error).__name__ == "SafetensorError" and (number := re.search(r"I/O error: .*\(os error (\d+)\)", text)):
        return _failure(path, int(number[1]))
    if isinstance(error, RuntimeError) and ("inline_container.cc" in text or "PytorchStreamWriter" in text):
        return _failure(path, errno.ENOSPC)  # torch.save does not say why; a disk that is full is why
    return None


def _failure(path: Path, number: int) -> WriteFailed:
    cause = os.strerror(number)
    if number not in FULL:
        return WriteFailed(
            f"{path} cannot be written: {cause}; make it writable, or use a folder that is (RUN=<path>, or start in another)"
        )
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return WriteFailed(
        f"{path} cannot be written: {cause} ({shutil.disk_usage(place).free / 1e6:.1f} MB are free there); what it holds "
        "is whole. Free some space, then the same command goes on"
    )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """For code that does nothing but make and write files at `path`: WriteFailed instead of any OSError."""
    try:
        yield
    except OSError as error:
        raise _failure(path, error.errno) from error


def _lock(path: Path, busy: Callable[[str], Any]) -> int:
    """An open, locked file that names its owner. busy: called with the other owner before waiting for it; may raise."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy(os.read(lock, 200).decode("utf-8", "replace").strip() or "unknown")
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.ftruncate(lock, os.pwrite(lock, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0))
    except BaseException:
        os.close(lock)
        raise
    return lock


def refuse_secrets(config: Mapping) -> None:
    """Raise RunRefused when a key named like a secret (api_key, hub_token, password, ...) holds text.

    A token of a vocabulary (pad_token, eos_token, ...) is no secret. Looks at names only: a secret under
    a harmless name is not found.
    """
    for name, value in _leaves(config):
        key = name.rsplit(".", 1)[-1].lower()
        if isinstance(value, str) and value and SECRET.search(key) and not VOCABULARY.search(key):
            raise RunRefused(f"{name} looks like a secret; keys come from the environment, remove it from the config")


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of everything in a nested config; an empty dict or list is a value."""
    if isinstance(value, Mapping) and value:
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
        return [leaf for i, v in enumerate(value) for leaf in _leaves(v, f"{prefix}.{i}")]
    return [(prefix, value)]


def plain(value: Any) -> Any:
    """Strict-JSON form: numpy and torch values become Python ones, paths text, NaN and infinities None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str | None:
    return None if value is None else str(value).encode("utf-8", "replace").decode("utf-8")


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(re.fullmatch(pattern, entry.name), entry) for entry in folder.iterdir()]
    return sorted((int(match[1]), entry) for match, entry in found if match)


def _flush(path: Path) -> None:
    """To the disk: a file, or every file of a folder."""
    for one in (path, *path.rglob("*")):
        if one.is_file():
            with one.open("rb") as file:
                os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.exists():
        _delete(path)


def _delete(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
        return not any(map(_is_cut, checkpoint.rglob("*.*")))
    except (OSError, ValueError):
        return False


def _is_cut(path: Path) -> bool:
    """Whether a file of tensors is shorter than it says: by its header (safetensors) or without its end (torch.save)."""
    if path.suffix in (".pt", ".pth"):
        return not zipfile.is_zipfile(path)
    if path.suffix != ".safetensors":
        return False
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(size, 2**27)))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return path.stat().st_size < 8 + size + max(ends, default=0)

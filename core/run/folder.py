"""The run folder: everything one run leaves behind, safe against crashes, second processes and mix-ups.

    config.yaml         resolved configuration, no secrets     metrics.jsonl   one JSON object per log, with `step`
    rollouts.parquet/   step-000012.parquet, ...; one dataset  checkpoints/    checkpoint-12/, ...
    model/ samples/ eval.json report.html summary.json         .lock           owner's pid; marks a run folder

`RunFolder(path)` looks; `RunFolder.open(path, config)` owns: it creates or resumes, and holds the lock until closed.
Every file is complete or absent: written beside its place, flushed to disk, then renamed over it. Only metrics.jsonl is
appended to; a line cut by a crash is dropped. JSON is strict: NaN and infinities are written as null, read as NaN.

Not covered: file systems without flock (some network mounts), and a process that writes without opening.
"""

import fcntl
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

if TYPE_CHECKING:
    import pyarrow

SECRET = re.compile(r"(?:key|token|secret|password|passwd|credentials?)[_\d]*$")
VOCABULARY = re.compile(r"(?:^|_)(?:pad|eos|bos|unk|mask|sep|cls|image|audio|video)_token$")


class RunRefused(ValueError):
    """The folder may not be used this way; the message says why and how to go on."""


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
        one whose config differs (naming the keys).
        """
        refuse_secrets(config)
        run = cls(path)
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

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- files

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write `path/name` whole or not at all; missing folders are made. Returns the file's path."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")  # hidden: a reader of the folder as a dataset skips it
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
        return target

    def write_text(self, name: str, text: str) -> Path:
        return self.write_bytes(name, text.encode("utf-8", "replace"))

    def write_json(self, name: str, value: Any) -> Path:
        return self.write_text(name, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

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
        line = json.dumps({"step": int(step), **_plain(metrics)}, ensure_ascii=False, allow_nan=False)
        with (self.path / "metrics.jsonl").open("ab") as file:
            file.write(line.encode("utf-8", "replace") + b"\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl in order; null becomes NaN and a last line cut by a crash is left out."""
        try:
            lines = (self.path / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        return [{k: math.nan if v is None else v for k, v in json.loads(line).items()} for line in lines]

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
                arrays[name] = pa.array(_plain(list(values)))
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
        text = "".join(json.dumps(_plain(line), ensure_ascii=False, allow_nan=False) + "\n" for line in kept)
        self.write_text("metrics.jsonl", text)
        for at, part in self._parts():
            if at > step:
                part.unlink()

    def last_checkpoint(self) -> Path | None:
        """Newest complete checkpoints/checkpoint-N: its trainer_state.json, written last, is there and parses.

        The owner of the folder also deletes the incomplete ones, which a crash left.
        """
        best = None
        for _, folder in _numbered(self.path / "checkpoints", r"checkpoint-(\d+)"):
            try:
                json.loads((folder / "trainer_state.json").read_bytes())
                best = folder
            except (OSError, ValueError):
                if self._lock is not None:
                    shutil.rmtree(folder)
        return best

    # ---------------------------------------------------------------- inside

    def _parts(self) -> list[tuple[int, Path]]:
        return _numbered(self.path / "rollouts.parquet", r"step-(\d+)\.parquet")

    def _take_lock(self) -> None:
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 200).decode("utf-8", "replace").strip() or "unknown"
            os.close(lock)
            raise RunRefused(
                f"{self.path} is in use by another process ({owner}); wait for it, end it, or choose RUN=<another name>"
            ) from None
        os.ftruncate(lock, 0)
        os.write(lock, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock = lock

    def _clear(self) -> None:
        """Delete all but the lock; interrupted, it leaves a recognised run, unfinished and without checkpoints."""
        order = {"summary.json": 0, "checkpoints": 1, "config.yaml": 3}
        for entry in sorted(self.path.iterdir(), key=lambda entry: order.get(entry.name, 2)):
            if entry.name == ".lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

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


def _plain(value: Any) -> Any:
    """Strict-JSON form: numpy and torch values become Python ones, paths text, NaN and infinities None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
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

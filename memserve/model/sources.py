"""Where a model's weights come from: a folder, the hub, a GGUF file, the demo model.

Each source ends as the path of a Hugging Face checkpoint folder whose weight files are all there (as
far as their names tell: nothing is opened). Weights that have to be converted are written to
`<cache>/models/<key>/`, which appears complete or not at all.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_never

from memserve.errors import ModelNotFound
from memserve.model.demo import fetch_demo_gguf
from memserve.model.gguf_conversion import convert_gguf
from memserve.model.prepared import (
    DemoSource,
    FolderSource,
    GgufSource,
    HubSource,
    Progress,
    ReportProgress,
    Source,
    source_key,
)

TEXT_ASSETS = ["*.json", "*.jinja", "*.model", "*.txt"]
FOREIGN_FORMATS = ["onnx/*", "original/*", "metal/*", "openvino/*", "consolidated*"]


def obtain_weights(source: Source, cache: Path, progress: ReportProgress) -> Path:
    """The checkpoint folder of `source`, fetched or converted if need be.

    Raises `ModelNotFound` if it can't be had, `UnsupportedModel` if it can't be converted.
    """
    match source:
        case FolderSource():
            weights = source.folder
        case HubSource():
            weights = _fetch_from_hub(source.name, progress)
        case DemoSource() | GgufSource():
            weights = cache / "models" / source_key(source)
            if not weights.is_dir():
                with complete_folder(weights) as partial:
                    _convert(source, partial, progress)
        case _:
            assert_never(source)
    check_checkpoint(weights)
    return weights


def _convert(source: DemoSource | GgufSource, folder: Path, progress: ReportProgress) -> None:
    downloads = folder / "download"
    match source:
        case DemoSource():
            file = fetch_demo_gguf(downloads, progress)
        case GgufSource():
            file = source.file
        case _:
            assert_never(source)
    progress(Progress(f"Converting {file.name} to bfloat16"))
    convert_gguf(file, folder)
    shutil.rmtree(downloads, ignore_errors=True)


@contextlib.contextmanager
def complete_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, put in the place of `final` at the end, or removed when the block fails.

    What a killed predecessor left is removed first, so only one process may be here for one `final`.
    """
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync_files(partial)
        if final.exists():
            former = final.with_name(f"{final.name}.former.partial")
            shutil.rmtree(former, ignore_errors=True)
            final.rename(former)
            partial.rename(final)
            shutil.rmtree(former)
        else:
            partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync_files(folder: Path) -> None:
    """Have the contents on disk before the name is: a crash must not leave a folder of empty files."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def check_checkpoint(folder: Path) -> None:
    """Raise `ModelNotFound` unless `folder` names a configuration and every weight file."""
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"{folder} is not a Hugging Face checkpoint: it has no config.json")
    for pattern, index in (
        ("*.safetensors", "model.safetensors.index.json"),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).is_file():
            weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
            missing = sorted(
                file for file in set(weight_map.values()) if not (folder / file).is_file()
            )
            if missing:
                raise ModelNotFound(
                    f"{folder} lacks {len(missing)} of its weight files, for one {missing[0]}"
                )
            return
        if any(folder.glob(pattern)):
            return
    hint = "; name the .gguf file itself" if any(folder.glob("*.gguf")) else ""
    raise ModelNotFound(f"{folder} has no weights (*.safetensors or pytorch_model*.bin){hint}")


def _fetch_from_hub(name: str, progress: ReportProgress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    stage = f"Fetching {name} from the Hugging Face hub"
    progress(Progress(stage))
    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            folder = Path(
                snapshot_download(
                    name,
                    allow_patterns=[*TEXT_ASSETS, weights],
                    ignore_patterns=FOREIGN_FORMATS,
                    tqdm_class=_reporting_bar(stage, progress),
                )
            )
            if any(folder.glob(weights)):
                break
    except GatedRepoError:
        raise ModelNotFound(
            f"{name} is gated: accept its terms on the hub, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ModelNotFound(
            f"the hub has no model {name} (or it is private and HF_TOKEN does not open it)"
        ) from None
    except LocalEntryNotFoundError:
        raise ModelNotFound(
            f"{name} is not in the hub's cache on this machine, and the hub can't be reached"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelNotFound(f"{name} can't be fetched from the hub: {error}") from None
    return folder


def _reporting_bar(stage: str, progress: ReportProgress) -> Any:  # noqa: ANN401
    """A tqdm class for huggingface_hub that draws nothing and reports bytes."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class ReportingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            # There is a second bar for the bytes on the wire; one of them is enough.
            self._reports = not str(kwargs.pop("name", "")).endswith(".transfer")
            kwargs["file"] = _Nowhere()
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> Any:  # noqa: ANN401
            shown = super().update(n)
            if self._reports and self.unit == "B":
                progress(Progress(stage, int(self.n), int(self.total) if self.total else None))
            return shown

    return ReportingBar


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

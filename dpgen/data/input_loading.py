"""Load the rows that `data.*` names: files and folders by `dpgen.data.reading`, the rest by `datasets`.

Files without rows are no mistake: an empty input is a run with an empty result.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpgen.config.checks import parse_range
from dpgen.config.sections import DataConfig
from dpgen.data.hub import explain_hub_error
from dpgen.data.input_rows import InputRows
from dpgen.data.input_source import InputSource
from dpgen.data.reading.cache import compute_files_key, describe_error, read_files
from dpgen.data.reading.dataset_folder import (
    check_folder_name,
    explain_card,
    has_configurations,
    is_media_folder,
    is_read_alike,
    load_files_with_rows,
)
from dpgen.data.reading.files import (
    check_all_read,
    check_names_read,
    explain_no_data,
    find_all_files,
    find_input_kind,
    find_kind,
    list_other_files,
    looks_local,
    reject_hub_keys,
    reject_requests,
)
from dpgen.data.reading.source import UnreadableInput
from dpgen.data.storage.fetched_input import FetchedInput, fetch_input
from dpgen.errors import ConfigError
from dpgen.formatting import format_count
from dpgen.imports import imports_without_gc

if TYPE_CHECKING:
    import datasets

_CACHE_PREFIXES = ("cache-", "tmp")  # of files that `datasets` adds to a saved dataset when it selects rows
_SAVED_DATASET = {"state.json", "dataset_dict.json"}  # files that save_to_disk writes


def load_input(config: DataConfig, fetched: FetchedInput | None = None) -> InputRows:
    """Return the rows that `data.*` names, and build the cache where it is missing.

    Args:
        fetched: the same section with files in place of addresses; None to fetch them now.

    Raises:
        ConfigError: the input or its split doesn't exist, or can't be read.
    """
    fetched = fetched or fetch_input(config)
    with fetched.name_addresses():
        return _load_local(fetched.data)


def _load_local(config: DataConfig) -> InputRows:
    with imports_without_gc():
        import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    with _translate_errors(config):
        dataset, source = _load(config)
    return _cut(config, dataset, source)


@contextmanager
def _translate_errors(config: DataConfig) -> Iterator[None]:
    path = config.path if isinstance(config.path, str) or len(config.path) != 1 else config.path[0]
    try:
        yield
    except (ConfigError, KeyboardInterrupt):
        raise
    except UnreadableInput as error:
        raise ConfigError(f"data.path={path}: {error}") from None
    except Exception as error:  # noqa: BLE001 - `datasets` passes on all that its readers raise; all of it is about the input
        reason = explain_hub_error(str(path), error, "dataset") or describe_error(error, _get_cache())
        raise ConfigError(f"data.path={path}: {reason}") from None


def _cut(config: DataConfig, dataset: datasets.Dataset, source: InputSource) -> InputRows:
    """Apply `data.select` and `data.limit`."""
    dataset = dataset.with_format(None)
    base = range(len(dataset)) if source.base is None else source.base
    if config.select is not None:
        chosen = parse_range(config.select)
        indices, base = range(len(dataset))[chosen], base[chosen]
        if len(dataset) and not indices:
            num_rows = format_count(len(dataset), "row")
            raise ConfigError(f"data.select={config.select}: selects none of the input's {num_rows}")
        dataset = dataset.select(indices) if indices else dataset
    if config.limit is not None:
        dataset, base = dataset.select(range(min(config.limit, len(dataset)))), base[: config.limit]
    key = None if source.key is None else f"{source.key} {config.split} {config.select} {config.limit}"
    load_before = source.load_before

    def cut_before() -> datasets.Dataset:
        assert load_before is not None
        with _translate_errors(config):
            return _cut(config, load_before(), InputSource()).dataset

    return InputRows(dataset, replace(source, key=key, base=base, load_before=load_before and cut_before))


def _load(config: DataConfig) -> tuple[datasets.Dataset, InputSource]:
    import datasets

    files = find_all_files(config.path)
    if files:
        reject_hub_keys(config, "name", "revision")
        return _read_splits({"train": files}, config, lambda: _load_files_before(files, config.split or "train"))
    path = config.path if isinstance(config.path, str) else config.path[0]
    path = str(Path(path).expanduser()) if looks_local(path) else path
    if not os.path.isdir(path):
        reject_requests(config)
        loaded = datasets.load_dataset(path, config.name, split=config.split, revision=config.revision)
        return _select_split(loaded, config.split), InputSource()
    reject_hub_keys(config, "revision")
    if not _SAVED_DATASET & set(os.listdir(path)):
        return _load_folder(path, config)
    reject_hub_keys(config, "name")
    reject_requests(config)
    names = (file for file in Path(path).rglob("*") if not file.name.startswith(_CACHE_PREFIXES))
    files = sorted(str(file) for file in names if file.is_file())
    try:
        saved = _select_split(datasets.load_from_disk(path), config.split)
    except IndexError:  # `datasets` raises it where a saved dataset has no rows
        saved = datasets.Dataset.from_dict({})
    return saved, InputSource.of_saved_dataset(path, files)


def _load_folder(path: str, config: DataConfig) -> tuple[datasets.Dataset, InputSource]:
    """Return the rows of a folder of files, in the splits and in the order that `datasets` finds in it.

    Raises:
        ConfigError: a data file of the folder is in no split; or the folder has several configurations, or splits.
    """
    import datasets

    check_folder_name(path)
    try:
        builder = datasets.load_dataset_builder(path, config.name)
    except datasets.exceptions.DataFilesNotFoundError:
        raise ConfigError(f"data.path={path}: {explain_no_data(path)}") from None
    except Exception as error:  # a card may hold anything
        if problem := explain_card(path, _read_card):
            raise ConfigError(f"data.path={path}: {problem}") from None
        if re.search("Config name is missing|BuilderConfig", str(error)) is None:
            raise
        names = ", ".join(datasets.get_dataset_config_names(path))
        problem = "data.name is needed" if config.name is None else f"data.name={config.name} is not there"
        raise ConfigError(f"{problem}: data.path={path} holds the configurations {names}") from None
    splits = {str(name): [str(file) for file in files] for name, files in (builder.config.data_files or {}).items()}
    files = [file for names in splits.values() for file in names]
    if not has_configurations(path):
        check_all_read(path, files)
        if not is_media_folder(builder):
            check_names_read(files)
    others = list_other_files(path, files)
    if config.split is None and len(splits) > 1:
        raise ConfigError(f"data.split is needed: there are {', '.join(sorted(splits))}")

    # A folder may hold a million images.
    key = compute_files_key(files, opens_files=not is_media_folder(builder))

    def load() -> datasets.Dataset:
        cache = _get_cache() / "dpgen" / f"folder-{key}"
        loaded = datasets.load_dataset(path, config.name, split=config.split, cache_dir=str(cache))
        return _select_split(loaded, config.split)

    if is_read_alike(builder):
        dataset, source = _read_splits(splits, config, load)
        return dataset, replace(source, other_files=others)
    return load(), InputSource(num_files=len(files), key=key, other_files=others)


def _read_card(card: Path) -> Any:
    from datasets.load import DatasetCard
    from datasets.utils.metadata import MetadataConfigs

    return MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data)


def _read_splits(
    splits: dict[str, list[str]], config: DataConfig, load_before: Callable[[], datasets.Dataset]
) -> tuple[datasets.Dataset, InputSource]:
    """Return the rows of `data.split`, given the files of each split."""
    import datasets

    spec = config.split or next(iter(splits))
    wanted = [name for name in splits if re.search(rf"\b{re.escape(name)}\b", spec)]
    if not wanted:
        raise ConfigError(f"data.split={spec}: there are only {', '.join(sorted(splits))}")
    files = [file for name in wanted for file in splits[name]]
    kind = find_input_kind(files, config.format)
    path, description, key = read_files(kind, files, _get_cache())
    dataset = datasets.Dataset.from_file(str(path))
    if not len(dataset) and not dataset.column_names:
        dataset = datasets.Dataset.from_dict({})
    source = InputSource(kind, len(files), key, description, load_before=load_before)
    if spec == wanted[0]:
        return dataset, source
    num_rows, starts, position = dict.fromkeys(wanted, 0), {}, 0
    counts = iter(description.num_rows)
    for name in wanted:
        starts[name], num_rows[name] = position, sum(next(counts) for _ in splits[name])
        position += num_rows[name]
    parts = [
        np.arange(starts[part.splitname] + (part.from_ or 0), starts[part.splitname] + (part.to or 0))
        for part in datasets.ReadInstruction.from_spec(spec).to_absolute(num_rows)
    ]
    base = np.concatenate(parts)
    return dataset.select(base), replace(source, base=base)


def _load_files_before(files: list[str], split: str) -> datasets.Dataset:
    """Return the rows of files of one kind as older versions of dpgen read them, with `datasets`."""
    import datasets

    kind = find_kind(files)
    options = {"sep": "\t"} if kind == "tsv" else {}
    cache = _get_cache() / "dpgen" / f"before-{compute_files_key(files)}"

    def load(paths: list[str]) -> datasets.Dataset:
        data_files = [glob.escape(path) for path in paths]  # `datasets` takes file names for patterns
        builder = "csv" if kind == "tsv" else kind
        return datasets.load_dataset(builder, data_files=data_files, split=split, cache_dir=str(cache), **options)

    return load_files_with_rows(files, load) or datasets.Dataset.from_dict({})


def _get_cache() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE)


def list_hub_folders(name: str) -> tuple[str, ...]:
    """Return the folders where the files of a dataset of the Hub are kept."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = f"datasets--{name.replace('/', '--')}"
    return os.path.join(HF_HUB_CACHE, repository), str(datasets.config.DOWNLOADED_DATASETS_PATH)


def _select_split(loaded: Any, split: str | None) -> datasets.Dataset:
    import datasets

    if isinstance(loaded, datasets.Dataset):
        return loaded
    names = sorted(map(str, loaded))
    if split is None and len(names) > 1:
        raise ConfigError(f"data.split is needed: there are {', '.join(names)}")
    chosen = split or names[0]
    if chosen not in loaded:
        raise ConfigError(f"data.split={chosen}: there are only {', '.join(names)}")
    return loaded[chosen]

"""Give vLLM's renderer the media of a row: what vLLM calls a connector, which loads media by their URLs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector

LoadFn = Callable[[int, Callable[[bytes], Any]], Any]


@MEDIA_CONNECTOR_REGISTRY.register("dpgen")
class RowMediaConnector(MediaConnector):
    """Load the media of the row that is being prepared; their URLs are their numbers."""

    _load: ClassVar[LoadFn]

    @classmethod
    @contextmanager
    def serve(cls, load: LoadFn) -> Iterator[None]:
        """Load media by a function within the block.

        Args:
            load: given a medium's number and vLLM's function that decodes its contents, returns what that returns.
        """
        cls._load = staticmethod(load)
        try:
            yield
        finally:
            del cls._load

    def load_from_url(self, url: str, media_io: Any, **options: Any) -> Any:
        """Return a medium, decoded."""
        return type(self)._load(int(url.partition(":")[2]), media_io.load_bytes)


def load_connector(model_config: Any) -> RowMediaConnector:
    """Return a connector that decodes as the model's configuration says."""
    multimodal = model_config.multimodal_config
    return RowMediaConnector(media_io_kwargs=None if multimodal is None else multimodal.media_io_kwargs)

"""Files of MDS directories in remote storage, through Streaming's uploaders and downloaders.

Any URL that Streaming knows (s3://, gs://, ...; S3_ENDPOINT_URL names another S3 service), or a folder. A download that
is slow, fails or is not what the index says is tried again, and ends in one error; a file under its own name is whole.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from streaming.base.storage import CloudDownloader, CloudUploader

from llmshearing import files as durable
from llmshearing.errors import ShearingError

log = logging.getLogger(__name__)

BACKOFF = 0.5  # seconds before the second attempt; doubles
_downloaders: dict[tuple[int, str, float], CloudDownloader] = {}
Problem = Callable[[Path], str | None]


@dataclass(frozen=True)
class Remote:
    """A remote directory. retry: attempts after the first. timeout: seconds for one attempt."""

    url: str
    retry: int = 2
    timeout: float = 60.0

    @property
    def longest(self) -> float:
        """Seconds that `fetch` can take."""
        return (self.retry + 1) * self.timeout + BACKOFF * (2**self.retry - 1)

    def __post_init__(self) -> None:
        try:
            CloudDownloader.get(self.url)
        except Exception as error:  # what is missing differs by storage
            raise ShearingError(f"remote = {self.url} is no address that Streaming can read: {error}") from error

    def below(self, name: str) -> "Remote":
        """A directory inside."""
        return replace(self, url=f"{self.url.rstrip('/')}/{name}")

    def fetch(self, name: str, target: Path, problem: Problem) -> None:
        """Download a file to `target`; `problem` looks at it first and says what is wrong, or None.

        Raises ShearingError when all attempts are used up; `target` is then as it was.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        said = ""
        for attempt in range(self.retry + 1):
            if attempt:
                log.warning("downloading %s/%s failed (%s); trying again", self.url, name, said)
                time.sleep(BACKOFF * 2 ** (attempt - 1))
            temporary = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
            try:
                said = self._download(name, temporary) or problem(temporary) or ""
                if not said:
                    durable.publish(temporary, target)
                    return
                said = said.replace(str(temporary), target.name)
            finally:
                temporary.unlink(missing_ok=True)
        raise ShearingError(
            f"{self.url}/{name} could not be downloaded in {self.retry + 1} attempts, the last one: {said}. Check the "
            "address, the credentials and the network, or raise download_retry and download_timeout"
        )

    def _download(self, name: str, target: Path) -> str | None:
        """One attempt; what went wrong, or None.

        In a thread, as Streaming's own timeout is for each read from the network: a server that sends a byte a second
        would keep it waiting for hours. A thread that is late is left alone and cleans up after itself.
        """
        said: list[str | None] = []
        late = threading.Event()

        def work() -> None:
            try:
                self._downloader().download(f"{self.url}/{name}", str(target), self.timeout)
                said.append(None)
            except Exception as error:  # each kind of storage has errors of its own
                said.append(str(error) or repr(error))
            if late.is_set():
                target.unlink(missing_ok=True)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            late.set()
            said = [f"it took more than {self.timeout:g} seconds"]
        if said[0]:
            _downloaders.clear()
        return said[0]

    def _downloader(self) -> CloudDownloader:
        """Of this process; making one for S3 takes longer than a small download."""
        key = (os.getpid(), self.url.partition("://")[0], self.timeout)
        if key not in _downloaders:
            _downloaders[key] = CloudDownloader.get(self.url)
        return _downloaders[key]


class Upload:
    """Copies files below `root` to the same places below `url`; None: nowhere.

    Raises UploadFailed where the remote storage cannot be reached.
    """

    def __init__(self, root: Path, url: str | None) -> None:
        self.root, self.url = root, url
        if url is not None:
            with _upload_errors(url):
                self._uploader = CloudUploader.get((str(root), url), keep_local=True, exist_ok=True)

    def __call__(self, files: Sequence[Path]) -> None:
        """Copy files, overwriting; Streaming tries again where that fails."""
        if self.url is None:
            return
        for path in files:
            name = str(path.relative_to(self.root))
            with _upload_errors(f"{self.url}/{name}"):
                if "://" not in self.url:  # Streaming makes no folders in a folder
                    Path(self.url, name).parent.mkdir(parents=True, exist_ok=True)
                self._uploader.upload_file(name)


class UploadFailed(OSError):
    """The input is not to blame: the same command goes on later."""


@contextmanager
def _upload_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each kind of storage has errors of its own
        raise UploadFailed(f"uploading {what} failed: {error}") from error

"""Every error that the store raises, drawn as a tree.

    StoreError                      anything below; its text is one line, ready to show
    ├── ArtifactNotFoundError       no such file, or it cannot be read
    ├── ArtifactWriteError          the artifact could not be written; nothing was left behind
    ├── ArtifactMergeError          artifacts that cannot be merged
    └── ArtifactFormatError         the bytes are not a valid artifact
        ├── ArtifactVersionError    an artifact of a major version that this reader does not know
        └── ArtifactDigestError     the content is not what the manifest's SHA-256 says

Each message names the file and the tensor, what was found, what was expected and the next step.
"""

_MAX_CHARACTERS = 1000


class StoreError(Exception):
    """Anything that goes wrong in the store and that a user can cause."""

    def __init__(self, text: str) -> None:
        """Hold one line that may be shown: names in it may come from a stranger's file.

        Args:
            text: what cannot be printed is escaped, and the middle of a very long text is left out.
        """
        if len(text) > _MAX_CHARACTERS:
            text = f"{text[: _MAX_CHARACTERS // 2]} […] {text[-_MAX_CHARACTERS // 2 :]}"
        super().__init__("".join(part if part.isprintable() else repr(part)[1:-1] for part in text))


class ArtifactNotFoundError(StoreError):
    """The artifact does not exist or cannot be read."""


class ArtifactWriteError(StoreError):
    """The artifact could not be written."""


class ArtifactMergeError(StoreError):
    """Artifacts of different teachers or preprocessing, or of the same images, cannot be merged."""


class ArtifactFormatError(StoreError):
    """The file is not a valid artifact."""


class ArtifactVersionError(ArtifactFormatError):
    """The artifact has a major version that this reader does not know."""


class ArtifactDigestError(ArtifactFormatError):
    """A tensor or the manifest differs from its SHA-256."""

"""The exceptions of the draft registry.

```
RegistryError (RedraftError)
├── RegistryUnavailable     the store cannot be reached, read or written; trying again later may help
│   └── RegistryFull        no space, or a quota is used up
├── CorruptRegistry         CURRENT cannot be read, or a newer redraft wrote the registry
├── DraftNotFound           no such version
├── VersionTaken            the version exists with other contents, or on the other side of the gate
├── CorruptDraft            files missing, cut, changed or not described; a manifest that is not valid
│   └── UnsafeDraft         a pickle, or a file name that a registry does not hold
├── WrongTarget             made for another target or another vocabulary
├── DraftWithdrawn          refused, rolled back or retired: not to be served
├── CurrentChanged          somebody else moved CURRENT first
├── Pinned                  CURRENT is pinned, so nothing moves it
└── NoPreviousDraft         nothing to roll back to
```

Messages are one line, name versions and files, and never hold the credentials of a URL.
"""

from redraft.errors import RedraftError


class RegistryError(RedraftError):
    """Base of everything that the registry raises on purpose."""


class RegistryUnavailable(RegistryError):
    """The store cannot be reached, read or written."""


class RegistryFull(RegistryUnavailable):
    """The store has no space left."""


class CorruptRegistry(RegistryError):
    """What says which draft is current cannot be read, or a newer redraft wrote the registry."""


class DraftNotFound(RegistryError):
    """The registry has no such version."""


class VersionTaken(RegistryError):
    """The version exists with other contents, or was refused and cannot be published."""


class CorruptDraft(RegistryError):
    """A draft's files are not those that its manifest names, or the manifest is not valid."""


class UnsafeDraft(CorruptDraft):
    """A draft holds a file that a registry does not: a pickle, code, or a name with a path in it."""


class WrongTarget(RegistryError):
    """The draft was made for another target, or for another vocabulary."""


class DraftWithdrawn(RegistryError):
    """The draft was refused, rolled back or retired, so it does not go into service."""


class CurrentChanged(RegistryError):
    """Somebody else moved CURRENT first."""


class Pinned(RegistryError):
    """CURRENT is pinned."""


class NoPreviousDraft(RegistryError):
    """There is no earlier draft to roll back to."""

"""The exceptions of redraft: everything raised on purpose descends from `RedraftError`.

```
RedraftError
├── ConfigError                a setting is wrong, alone or beside another
└── ModelError                 a model or its tokenizer cannot be used
    ├── ModelNotFound          no such directory, file, hub id or revision; or the network is away
    ├── UnsupportedModel       readable, but not a decoder-only language model that we can run
    ├── UnsafeCheckpoint       weights only as pickle (.bin, .pt), which may run code when read
    ├── ChecksumMismatch       a downloaded file is not the one that was pinned
    ├── TokenizerMismatch      target and draft do not share their vocabulary
    └── ChatTemplateMissing    chat messages were given to a model without a chat template
```

A message is one line that names what is wrong and, where there is one, the way out: command-line tools print
it as it stands. It never holds prompt text.
"""


class RedraftError(Exception):
    """Base of every deliberate error."""


class ConfigError(RedraftError):
    """A setting is wrong, alone or beside another."""


class ModelError(RedraftError):
    """A model or its tokenizer cannot be used."""


class ModelNotFound(ModelError):
    """No such directory, file, hub id or revision, or it cannot be reached."""


class UnsupportedModel(ModelError):
    """Readable, but not a decoder-only language model that redraft can run."""


class UnsafeCheckpoint(ModelError):
    """The weights exist only in a pickle format, which may run code when read."""


class ChecksumMismatch(ModelError):
    """A file is not the one that was pinned."""


class TokenizerMismatch(ModelError):
    """Target and draft do not share their vocabulary."""


class ChatTemplateMissing(ModelError):
    """Chat messages were given to a model that has no chat template."""

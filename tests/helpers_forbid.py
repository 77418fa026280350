"""Makes Composer, Streaming and what they bring as good as not installed in this process."""

import sys

FORBIDDEN = {"composer", "streaming", "boto3", "oci", "azure", "paramiko"}


def install():
    """From now on `import` fails and `importlib.util.find_spec` finds nothing; none of them may have been imported."""
    found = FORBIDDEN & {name.partition(".")[0] for name in sys.modules}
    if found:
        raise RuntimeError(f"imported already: {sorted(found)}")
    sys.modules.update(dict.fromkeys(FORBIDDEN))

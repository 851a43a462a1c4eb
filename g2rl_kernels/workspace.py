"""How much memory an op may take for temporary tensors of vocabulary size."""

DEFAULT_WORKSPACE_BYTES = 256 << 20


def workspace_or_default(workspace_bytes: int) -> int:
    """The caller's limit; 0, which stands for none given, is a fixed amount here. A backend may have another rule."""
    return workspace_bytes or DEFAULT_WORKSPACE_BYTES

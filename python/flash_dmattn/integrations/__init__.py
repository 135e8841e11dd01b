"""What connects flash_dmattn to transformers. transformers is imported when something here first needs it."""

__all__ = ["register_attention"]


def register_attention() -> None:
    """Makes `attn_implementation="flash_dmattn"` work in every transformers model that supports custom attention.

    The models compute what they computed before. For the dynamic mask of Doge models in O(N w), see
    `flash_dmattn.integrations.doge.patch_doge`.

    Raises:
        ImportError: transformers is not installed.
    """
    from flash_dmattn.integrations import attention_interface

    attention_interface.register()

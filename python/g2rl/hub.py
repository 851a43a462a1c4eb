"""Whether the Hugging Face hub is there, asked once: libraries ask for a file again and again, for about a minute."""

from __future__ import annotations

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from g2rl.config import ConfigError


def no_connection(name: str, file: str, kind: str = "model") -> Exception | None:
    """What keeps the hub from being asked for a file of a model or data set; None where it answers, whatever it says.

    Raises:
        HFValidationError: `name` is none that the hub could have.
    """
    try:
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind))
    except HfHubHTTPError:
        pass
    except (HTTPError, OSError) as error:  # of the connection, or HF_HUB_OFFLINE
        return error
    return None


def require_hub(name: str, said: str) -> None:
    """Raise `ConfigError`, which begins with `said`, unless a model is kept on this machine or the hub can be asked.

    Args:
        name: of the model, which is no folder here. That the hub has none of this name is left to who loads it.
    """
    try:
        is_here = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError as error:
        raise ConfigError(f"{said}, found no folder {name!r}, which is no name on the hub either") from error
    lost = None if is_here else no_connection(name, "config.json")
    if lost is not None:
        found = f"no folder {name!r} and no connection to the hub ({type(lost).__name__}: {lost})"
        raise ConfigError(f"{said}, found {found}") from lost

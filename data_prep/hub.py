"""Whether the Hugging Face Hub has what a user named.

Its libraries ask a Hub that is out of reach again and again, for up to a minute; this asks once.
"""

from typing import Literal, NamedTuple

from sinkpretrain.errors import UserError, first_line


class Answer(NamedTuple):
    """The commit behind a revision, where the Hub tells it; why the Hub could not be asked, None if it was."""

    commit: str | None
    fault: str | None


def ask(what: str, kind: Literal["data set", "model"], name: str, revision: str | None = None) -> Answer:
    """Ask for a name that is nothing local; ``what`` it was given as begins the sentences.

    Raises:
        UserError: the Hub has no such thing.
    """
    from huggingface_hub import HfApi, errors

    try:
        if kind == "model":
            return Answer(HfApi().model_info(name, revision=revision, timeout=10).sha, None)
        return Answer(HfApi().dataset_info(name, revision=revision, timeout=10).sha, None)
    except errors.GatedRepoError:
        return Answer(None, None)  # whoever loads it says how to get in
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"{what} {name}: there is no file or folder of that name, and the Hub has no such {kind} (or does not "
            "show it without a login): check the name."
        ) from error
    except errors.HfHubHTTPError:
        return Answer(None, None)  # no such revision, or a fault of the Hub's: whoever loads it says which
    except Exception as error:  # out of reach, by whatever name the network's library calls that
        return Answer(None, first_line(error))


def out_of_reach(what: str, kind: Literal["data set", "model"], name: str, fault: str) -> UserError:
    """What to raise where the Hub could not be asked and the cache has nothing of that name either."""
    return UserError(
        f"{what} {name}: there is no file or folder of that name, and the Hub cannot be asked for a {kind} of that "
        f"name ({fault}): check the name, or the network."
    )

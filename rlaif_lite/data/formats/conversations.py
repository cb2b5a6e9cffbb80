"""Formats that hold a list of turns: the VLM-RLAIF release, LLaVA, ShareGPT, messages, and TRL's pairs and prompts."""

from ...errors import DataError
from ..records import Message, Record
from .build import record
from .media import path_of, video_of
from .turns import Turns, answers_in, read_answer, read_turns


def _frames(found: dict) -> tuple[str, ...]:
    images = found["images"]
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not images or not all(isinstance(frame, str) and frame for frame in images):
        raise DataError("`images` is not a list of frame paths.")
    return tuple(path_of(frame, "images") for frame in images)


def rlaif(found: dict, source: str) -> Record:
    """The frames of one video in `images` (SFT_short, SFT_long, PPO_init of the release). With `uid` (RL_data of the
    release) only the first two turns are used, as in the release."""
    turns = read_turns(found["conversations"], "conversations").messages
    return record(found, source, turns[:2] if "uid" in found else turns, _frames(found))


def rlaif_preference(found: dict, source: str) -> Record:
    """Two outputs and which is better (RM_13b_v1_dataset_39k of the release)."""
    for key in ("output_1", "output_2", "preference"):
        if key not in found:
            raise DataError(f"`{key}` is missing.")
    outputs = [read_answer(found[key], f"`{key}`") for key in ("output_1", "output_2")]
    if str(found["preference"]) not in ("1", "2"):
        raise DataError(f"`preference` is {found['preference']!r}, expected 1 or 2.")
    turns = read_turns(found["conversations"], "conversations")
    # The last answer in the file is a stand-in which the release overwrites by either output.
    messages = turns.messages[:-1] if turns.messages[-1].role == "assistant" else turns.messages
    better = int(found["preference"]) - 1
    video = _frames(found) if "images" in found else video_of(found, turns.inside, turns.marks)
    return record(found, source, messages, video, outputs[better], outputs[1 - better])


def llava(found: dict, source: str) -> Record:
    """`conversations` with a video, a picture or neither; ShareGPT's `chosen` and `rejected` where given."""
    return _conversation(found, source, "conversations")


def swift_pairs(found: dict, source: str) -> Record:
    """ms-swift's ShareGPT: a list of {human, assistant}."""
    rounds = found["conversation"]
    if not isinstance(rounds, list) or not rounds:
        raise DataError(f"`conversation` is {rounds!r}, expected a list of {{human, assistant}}.")
    messages = []
    for i, each in enumerate(rounds):
        if not isinstance(each, dict) or not isinstance(each.get("human"), str):
            raise DataError(f"`conversation` round {i} is {each!r}, expected {{human, assistant}}.")
        messages.append(Message("user", each["human"]))
        if each.get("assistant") is not None:
            messages.append(Message("assistant", read_answer(each["assistant"], f"`conversation` round {i}")))
    turns = Turns(messages, [])
    return record(found, source, turns, video_of(found, marks=turns.marks))


def messages(found: dict, source: str) -> Record:
    """`messages`; ms-swift's `rejected_response` or `rejected_messages` make the last answer the chosen one."""
    given = [key for key in ("rejected_response", "rejected_messages") if found.get(key) is not None]
    if not given:
        return _conversation(found, source, "messages")
    turns = read_turns(found["messages"], "messages")
    if turns.messages[-1].role != "assistant":
        raise DataError(
            f"`{given[0]}` is given, but `messages` ends with the user: there is no answer to prefer to it."
        )
    if given[0] == "rejected_messages":
        prompt, chosen, rejected = _whole(turns, read_turns(found["rejected_messages"], "rejected_messages"))
    else:
        prompt, chosen = turns.messages[:-1], turns.messages[-1].content
        rejected = read_answer(found["rejected_response"], "`rejected_response`")
    return record(found, source, prompt, video_of(found, turns.inside, turns.marks), chosen, rejected)


def trl_preference(found: dict, source: str) -> Record:
    """`chosen` and `rejected`: answers to `prompt`, or whole conversations that differ in their last answer."""
    for key in ("chosen", "rejected"):
        if key not in found:
            raise DataError(f"`{key}` is missing.")
    whole = [isinstance(found[key], list) and len(found[key]) > 1 for key in ("chosen", "rejected")]
    if not any(whole):
        if "prompt" not in found:
            raise DataError("`prompt` is missing, and `chosen` is not a whole conversation.")
        return _conversation(found, source, "prompt")
    chosen, rejected = (read_turns(found[key], key) for key in ("chosen", "rejected"))
    prompt, better, worse = _whole(chosen, rejected)
    if "prompt" in found:
        said = read_turns(found["prompt"], "prompt").messages
        if said not in (prompt, prompt[-1:]):
            raise DataError("`prompt` is not what `chosen` begins with.")
    return record(found, source, prompt, video_of(found, chosen.inside, chosen.marks), better, worse)


def trl_prompt(found: dict, source: str) -> Record:
    """`prompt` alone or with `completion`."""
    turns = read_turns(found["prompt"], "prompt")
    said = list(turns.messages)
    if found.get("completion") is not None:
        said.append(Message("assistant", read_answer(found["completion"], "`completion`")))
    return record(found, source, said, video_of(found, turns.inside, turns.marks))


def _conversation(found: dict, source: str, key: str) -> Record:
    turns = read_turns(found[key], key)
    video = video_of(found, turns.inside, turns.marks)
    return record(found, source, turns, video, *answers_in(found, "chosen", "rejected"))


def _whole(chosen: Turns, rejected: Turns) -> tuple[list[Message], str, str]:
    """Two conversations -> what they share, and the last answer of each."""
    if chosen.messages[-1].role != "assistant" or rejected.messages[-1].role != "assistant":
        raise DataError("`chosen` and `rejected` are conversations, but one does not end with an answer.")
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise DataError("`chosen` and `rejected` are conversations that differ before their last answer.")
    return chosen.messages[:-1], chosen.messages[-1].content, rejected.messages[-1].content

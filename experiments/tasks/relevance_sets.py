"""Texts for the relevance study: two task sets that differ in what tells the tasks apart, and public data.

*easy*: ten data sets, so that tasks differ in form and content. *hard*: the topics of one data set, with
one form of question. AG News asks for the headline of an article of a given topic, and CLINC150 for the
intent behind a request of a given domain. The public examples come from data sets that no task uses.
"""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from fedmosaic.client.model.examples import Example
from fedmosaic.experiments.tasks.rows import (
    read_csv,
    read_instructions,
    read_json,
    read_lines,
    read_requests,
    read_running_text,
)
from fedmosaic.protos.errors import ConfigurationError

Pairs = list[tuple[str, str]]

CLINC_DOMAINS: Final[Mapping[str, str]] = {
    "banking": "freeze_account routing pin_change bill_due pay_bill account_blocked interest_rate "
    "min_payment bill_balance transfer order_checks balance spending_history transactions report_fraud",
    "credit_cards": "replacement_card_duration expiration_date damaged_card improve_credit_score "
    "report_lost_card card_declined credit_limit_change apr redeem_rewards credit_limit rewards_balance "
    "application_status credit_score new_card international_fees",
    "kitchen_and_dining": "food_last confirm_reservation how_busy ingredients_list calories nutrition_info "
    "recipe restaurant_reviews restaurant_reservation meal_suggestion restaurant_suggestion "
    "cancel_reservation ingredient_substitution cook_time accept_reservations",
    "home": "what_song play_music todo_list_update reminder reminder_update calendar_update order_status "
    "update_playlist shopping_list calendar next_song order todo_list shopping_list_update smart_home",
    "auto_and_commute": "current_location oil_change_when oil_change_how uber traffic tire_pressure "
    "schedule_maintenance gas mpg distance directions last_maintenance gas_type tire_change jump_start",
    "travel": "plug_type travel_notification translate flight_status international_visa timezone "
    "exchange_rate travel_suggestion travel_alert vaccines lost_luggage book_flight book_hotel carry_on "
    "car_rental",
    "utility": "weather alarm date find_phone share_location timer make_call calculator definition "
    "measurement_conversion flip_coin spelling time roll_dice text",
    "work": "pto_request_status next_holiday insurance_change insurance meeting_schedule payday taxes income "
    "rollover_401k pto_balance pto_request w2 schedule_meeting direct_deposit pto_used",
    "small_talk": "who_made_you meaning_of_life who_do_you_work_for do_you_have_pets what_are_your_hobbies "
    "fun_fact what_is_your_name where_are_you_from goodbye thank_you greeting tell_joke are_you_a_bot "
    "how_old_are_you what_can_i_ask_you",
    "meta": "change_speed user_name whisper_mode yes change_volume no change_language repeat change_accent "
    "cancel sync_device change_user_name change_ai_name reset_settings maybe",
}
"""Intents of CLINC150 by domain (Larson et al. 2019, `data/domains.json` of clinc/oos-eval)."""


def load_task_set(name: str, data: Path, size: int, seed: int) -> dict[str, list[Example]]:
    """Draw at most `size` examples of every task of `easy`, `hard_news` or `hard_intents`, by task.

    Raises:
        ConfigurationError: no set has this name, or a data set is missing.
    """
    if name not in TASK_SETS:
        raise ConfigurationError(f"there is no task set {name!r}; choose from {', '.join(TASK_SETS)}")
    return _examples(_read(TASK_SETS[name], data), size, seed)


def load_public(data: Path, size: int, seed: int) -> list[Example]:
    """Read public examples for the basis from data sets that no task set uses.

    Instructions (self-instruct), reasoning (BIG-bench Hard), running text (WikiText-2) and titles (DBpedia
    abstracts). At most `size` of each of the 27 BIG-bench tasks, ten times as many of the others.

    Raises:
        ConfigurationError: a data set is missing.
    """
    sources = _read(_public, data)
    small = {name: pairs for name, pairs in sources.items() if name.startswith("bbh")}
    large = {name: pairs for name, pairs in sources.items() if name not in small}
    drawn = [*_examples(small, size, seed).values(), *_examples(large, 10 * size, seed).values()]
    return [example for source in drawn for example in source]


def _read(reader: Callable[[Path], dict[str, Pairs]], data: Path) -> dict[str, Pairs]:
    try:
        return reader(data)
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename} is missing; give the folder with the data sets"
        ) from error


def _examples(sources: dict[str, Pairs], size: int, seed: int) -> dict[str, list[Example]]:
    chosen = {}
    for name, pairs in sources.items():
        # A repeated text in both halves of a task would make the halves alike for the wrong reason.
        distinct = sorted({(prompt.strip(), answer.strip()) for prompt, answer in pairs})
        usable = [(prompt, answer) for prompt, answer in distinct if prompt and answer]
        random.Random(f"{seed} {name}").shuffle(usable)  # noqa: S311 - public data, no secret
        chosen[name] = [Example(f"{name}-{i}", *pair) for i, pair in enumerate(usable[:size])]
    return chosen


def _easy(data: Path) -> dict[str, Pairs]:
    text, questions = data / "cl_benchmark_text", data / "llm_adapters_qa"
    return {
        "gsm8k": [(row["question"], row["answer"]) for row in read_lines(data / "gsm8k/train.jsonl")],
        "e2e": [(f"Describe: {row['mr']}", row["ref"]) for row in read_csv(data / "e2e_nlg/devset.csv")],
        "mnli": _labelled(text / "NLI/MNLI", "Does sentence 1 entail or contradict sentence 2?"),
        "qqp": _labelled(text / "QQP/QQP", "Do both sentences mean the same?"),
        "sst2": _labelled(text / "SC/SST-2", "Is the sentiment good or bad?"),
        "boolq": _instructions(questions / "boolq"),
        "arc_easy": _instructions(questions / "ARC-Easy"),
        "agnews": [pair for pairs in _hard_news(data).values() for pair in pairs],
        "clinc150": [pair for pairs in _hard_intents(data).values() for pair in pairs],
        "banking77": [
            (f"{row['text']}\nCategory:", row["category"].replace("_", " "))
            for row in read_csv(data / "banking77/train.csv")
        ],
    }


def _hard_news(data: Path) -> dict[str, Pairs]:
    topics: dict[str, Pairs] = {}
    for split in ("train", "test"):
        path = data / f"cl_benchmark_text/TC/agnews/{split}.json"
        for row, pair in zip(read_json(path), _titles(path, "Article"), strict=True):
            topics.setdefault(row["label"], []).append(pair)
    return topics


def _hard_intents(data: Path) -> dict[str, Pairs]:
    domain_of = {intent: domain for domain, intents in CLINC_DOMAINS.items() for intent in intents.split()}
    domains: dict[str, Pairs] = {domain: [] for domain in CLINC_DOMAINS}
    for query, intent in read_requests(data):
        domains[domain_of[intent]].append((f"{query}\nIntent:", intent.replace("_", " ")))
    return domains


def _public(data: Path) -> dict[str, Pairs]:
    sources: dict[str, Pairs] = {
        f"bbh-{path.stem}": [(row["input"], row["target"]) for row in read_json(path)["examples"]]
        for path in sorted((data / "bbh").glob("*.json"))
    }
    for name, asked, answer in read_instructions(data):
        sources.setdefault(name, []).append((asked, answer))
    long = read_running_text(data, 56)
    sources["wikitext"] = [(" ".join(words[:24]), " ".join(words[24:56])) for words in long]
    sources["dbpedia"] = _titles(data / "cl_benchmark_text/TC/dbpedia/test.json", "Text")
    if len(sources) < 5:
        raise ConfigurationError(
            f"{data} holds neither bbh nor self_instruct; give the folder with the data sets"
        )
    return sources


TASK_SETS: Final[Mapping[str, Callable[[Path], dict[str, Pairs]]]] = {
    "easy": _easy,
    "hard_news": _hard_news,
    "hard_intents": _hard_intents,
}


def _splits(folder: Path) -> list[dict[str, str]]:
    return [row for split in ("train", "test") for row in read_json(folder / f"{split}.json")]


def _labelled(folder: Path, question: str) -> Pairs:
    rows = _splits(folder)
    return [(f"{row['sentence']}\n{question}", row["label"]) for row in rows if row["label"] != "-"]


def _titles(path: Path, kind: str) -> Pairs:
    parts = (row["sentence"].removeprefix("Title: ").partition("\nText: ") for row in read_json(path))
    return [(f"{kind}: {body}\nHeadline:", title) for title, _, body in parts]


def _instructions(folder: Path) -> Pairs:
    return [(row["instruction"], row["output"]) for row in _splits(folder)]

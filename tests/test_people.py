"""What people say of a run's answers: the files, the order, the statistics, the report, the export. No Gradio."""

import json
import multiprocessing
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from labelled import HASH, labelled_run
from rlaif_lite.cli import app
from rlaif_lite.data.readers import read_records
from rlaif_lite.errors import RlaifError, StageError
from rlaif_lite.recipe import load_recipe
from rlaif_lite.report.page import write
from rlaif_lite.report.people import Share, couple, read_people, share, trust
from rlaif_lite.stages.preference import read_pairs
from rlaif_lite.ui.store import Store
from rlaif_lite.workspace import Workspace
from run_folders import make_run
from test_report import text_of


@pytest.fixture
def run(tmp_path, world) -> Path:
    return labelled_run(tmp_path / "run", world)


@pytest.fixture
def store(run) -> Store:
    return Store(run)


def judge_all(store: Store, person: str, source: str, prefer, most: int = 99) -> list[str]:
    """A person judges up to `most` items: prefer(shown) -> "1", "2", "tie", "skip" -> the items, in order."""
    seen = []
    while len(seen) < most and (shown := store.next_item(person, source)) is not None:
        assert store.add(person, shown.item.id, prefer(shown))
        seen.append(shown.item.id)
    return seen


def for_role(role: str):
    return lambda shown: str(1 + shown.roles.index(role))


def lines(store: Store, person: str) -> list[dict]:
    path = store.folder / "labels" / f"{person}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------------ the store


def test_all_see_the_same_order_and_sides_of_their_own(store):
    assert store.sources() == ["policy", "judged"]
    assert [len(store.of(source)) for source in store.sources()] == [8, 16]
    orders, sides = [], []
    for person in ("anna", "ben"):
        shown = [store.show(person, item) for item in store.of("judged")]
        orders.append([one.item.id for one in shown])
        sides.append([one.roles for one in shown])
    assert orders[0] == orders[1] and sides[0] != sides[1]
    assert {roles[0] for roles in sides[0]} == {"chosen", "rejected"}  # neither side is always the same
    keys = [item.key for item in store.of("judged")]
    assert {*keys[:4]} == {"preference/00006", "preference/00007"}  # what the reward model never saw comes first
    assert keys != sorted(keys) and keys[4:] != sorted(keys[4:])
    first = store.show("anna", store.of("judged")[0])
    assert first.answers == tuple(
        dict(zip(("chosen", "rejected"), first.item.answers, strict=True))[r] for r in first.roles
    )
    assert first.question == "describe the video" and first.video.endswith(".mp4")


def test_a_verdict_is_on_disk_before_the_next_and_a_person_resumes(store, run):
    seen = judge_all(store, "anna", "judged", for_role("chosen"), most=5)
    assert [row["item"] for row in lines(store, "anna")] == seen
    row = lines(store, "anna")[0]
    assert (row["run"], row["person"], row["better"], row["source"]) == (HASH, "anna", "chosen", "judged")
    assert row["answers"]["chosen"] == store.items[seen[0]].answers[0] and row["video"].endswith(".mp4")
    again = Store(run)  # a reload, or another day
    assert again.progress("anna", "judged") == (5, 16) and again.progress("anna", "policy") == (0, 8)
    assert again.progress("ben", "judged") == (0, 16)
    rest = judge_all(again, "anna", "judged", for_role("chosen"))
    assert len(rest) == 11 and not {*rest} & {*seen} and again.next_item("anna", "judged") is None


def test_a_line_that_a_kill_cut_short_is_made_again(store):
    (first, second) = judge_all(store, "anna", "policy", for_role("sft"), most=2)
    path = store.folder / "labels" / "anna.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert store.progress("anna", "policy") == (1, 8)
    assert store.next_item("anna", "policy").item.id == second
    assert store.add("anna", second, "tie")
    assert [(row["item"], row["better"]) for row in lines(store, "anna")] == [(first, "sft"), (second, "tie")]


def test_two_pages_of_one_person_do_not_double_a_verdict(store, run):
    other = Store(run)
    one, two = store.next_item("anna", "policy"), other.next_item("anna", "policy")
    assert one.item.id == two.item.id
    assert store.add("anna", one.item.id, "1") and not other.add("anna", two.item.id, "2")
    assert [row["better"] for row in lines(store, "anna")] == [one.roles[0]]
    assert other.next_item("anna", "policy").item.id != one.item.id


def add_all(run: Path, barrier) -> None:
    store = Store(run)
    barrier.wait()
    for item in store.of("judged"):
        store.add("anna", item.id, "1")


def test_servers_that_write_at_once_lose_and_double_nothing(run):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    servers = [context.Process(target=add_all, args=(run, barrier)) for _ in range(2)]
    for server in servers:
        server.start()
    for server in servers:
        server.join(120)
    items = [row["item"] for row in lines(Store(run), "anna")]
    assert len(items) == len(set(items)) == 16


def test_a_verdict_can_be_taken_back(store):
    assert not store.back("anna", "policy")
    (first, second) = judge_all(store, "anna", "policy", for_role("policy"), most=2)
    assert store.back("anna", "policy") and store.next_item("anna", "policy").item.id == second
    assert store.add("anna", second, "skip") and store.progress("anna", "policy") == (2, 8)
    assert [row["better"] for row in lines(store, "anna")] == ["policy", "policy", "back", "skip"]
    assert store.verdicts(store.items[second]) == {} and store.verdicts(store.items[first]) == {"anna": "policy"}


def test_names_are_kept_as_first_written_and_cannot_leave_the_folder(store):
    judge_all(store, store.person("  Anna  Müller "), "policy", for_role("sft"), most=1)
    assert store.person("anna müller") == "Anna Müller" == store.person("ANNA MÜLLER")
    for wrong in ("", "..", "../x", "a/b", "a\0b", ".lock", "x" * 41):
        with pytest.raises(RlaifError, match="cannot be used as a name"):
            store.person(wrong)


def test_a_run_without_anything_to_compare_says_so(run):
    shutil.rmtree(run / "preference")
    for path in (run / "evaluate").glob("ppo*"):
        path.write_text((run / "evaluate" / "sft.greedy.jsonl").read_text().replace('"role": "sft"', '"role": "ppo"'))
    with pytest.raises(StageError, match="has nothing to compare"):
        Store(run)


# ------------------------------------------------------------------------------------------- labels that are not ours


def test_labels_of_another_run_are_refused_by_name_and_kept(store, run, tmp_path, world):
    other = labelled_run(tmp_path / "other", world, "ba9876543210")
    path = other / "evaluate" / "ppo.greedy.jsonl"
    path.write_text(path.read_text().replace("ppo says", "another policy says"))
    judge_all(Store(other), "ben", "policy", for_role("policy"))
    judge_all(store, "anna", "policy", for_role("policy"))
    copy = shutil.copy(other / "labels" / "ben.jsonl", run / "labels")
    before = Path(copy).read_bytes()
    with pytest.raises(StageError, match=r"ben\.jsonl is left out: 8 of its 8 labels are of another run \(recipe ba98"):
        Store(run)
    text = text_of(write(run))  # the report goes on without it
    assert "ben.jsonl is left out" in text and "anna: 8 verdicts" in text and "ben: " not in text
    assert Path(copy).read_bytes() == before


def test_labels_of_another_recipe_count_where_the_answers_are_the_same(store, run):
    """As after `rlaif-lite eval --best-of`, which changes the recipe and no answer."""
    judge_all(store, "anna", "policy", for_role("policy"))
    summary = json.loads((run / "summary.json").read_text()) | {"recipe_hash": "ffffffffffff"}
    (run / "summary.json").write_text(json.dumps(summary))
    assert Store(run).progress("anna", "policy") == (8, 8)


def test_labels_of_answers_that_are_gone_are_counted_out(store, run):
    judge_all(store, "anna", "policy", for_role("policy"))
    path = run / "evaluate" / "ppo.greedy.jsonl"
    path.write_text(path.read_text().replace("ppo says test/00003", "ppo says no more"))
    again = Store(run)
    assert again.progress("anna", "policy") == (7, 8) and again.labels().stale == 1
    assert "1 verdicts of people are about answers that this run no longer has" in text_of(write(run))


@pytest.mark.parametrize(
    ("line", "why"),
    [("{", "line 2 is not JSON"), ("[]", "line 2 is no label"), ('{"run": "x"}', "line 2 is no label (no `person`)")],
)
def test_a_damaged_file_is_named_with_its_line(store, run, line, why):
    judge_all(store, "anna", "policy", for_role("policy"), most=1)
    with open(run / "labels" / "anna.jsonl", "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(StageError) as error:
        store.add("anna", store.of("policy")[1].id, "1")
    assert f"anna.jsonl is left out: {why}" in str(error.value) and "Nothing in it was changed" in str(error.value)


# ----------------------------------------------------------------------------------------------------------- statistics


def test_a_share_has_wilsons_interval_over_videos():
    """10 of 10: 0.722 to 1; 5 of 10: 0.237 to 0.763, as tables of Wilson's interval have it."""
    assert share([]) is None
    assert share((str(i), 1.0) for i in range(10)) == pytest.approx((1.0, 0.7225, 1.0, 10, 10), abs=1e-4)
    assert share((str(i), float(i % 2)) for i in range(10)) == pytest.approx((0.5, 0.2366, 0.7634, 10, 10), abs=1e-4)
    assert share([("a", 1.0)] * 10) == pytest.approx((1.0, 0.2065, 1.0, 10, 1), abs=1e-4)  # one video is one draw
    uneven = share([("a", 1.0)] * 8 + [("b", 0.0), ("c", 0.5)])  # Kish: 10² / (64 + 1 + 1) = 1.5 videos
    assert uneven.value == 0.85 and uneven.low < 0.25


def label(item: int, better: str) -> tuple[str, dict]:
    return f"{item:016x}", {"item": f"{item:016x}", "better": better, "source": "policy", "video": str(item)}


def test_kappa_by_hand():
    """20 items, 14 alike; sides are drawn by the item's digest, so that both use each about half of the time."""
    one = dict(label(i, "policy" if i % 2 else "sft") for i in range(20))
    other = dict(label(i, "policy" if i % 2 == (i < 14) else "sft") for i in range(20))
    found = couple(("a", one), ("b", other))
    # `one` is on side True for every item; `other` in 14 of 20: chance = 14/20, so kappa is 0 for all its 70 %.
    assert (found.items, found.same, found.kappa) == (20, 0.7, 0.0)
    one = dict(label(i, "policy") for i in range(20))  # 10 on each side
    other = dict(label(i, "policy" if i < 14 else "sft") for i in range(20))
    assert couple(("a", one), ("b", other)).kappa == pytest.approx((0.7 - 0.5) / 0.5)
    assert couple(("a", one), ("b", one)).kappa == 1.0
    skipped = dict(label(i, "skip") for i in range(20))
    assert couple(("a", one), ("b", skipped)) is None


def test_agreement_of_judge_and_reward_model_with_people(store, run):
    judge_all(store, "anna", "judged", for_role("chosen"))
    wrong = {item.id for item in store.of("judged")[:6]}
    judge_all(
        store, "ben", "judged", lambda shown: "tie" if shown.item.id not in wrong else for_role("rejected")(shown)
    )
    found = read_people(run, [], "ppo", HASH)
    assert found.verdicts == {"anna": 16, "ben": 16} and found.policy is None
    assert (found.judge.value, found.judge.verdicts, found.judge.videos) == (16 / 22, 22, 8)
    # Of the four held-out pairs the reward model likes "<b>", which is half of them: anna agrees on 2, ben on 2.
    assert (found.reward.value, found.reward.verdicts) == (0.5, 8)
    assert (found.each_other.value, found.each_other.verdicts) == (0.0, 6)
    (two,) = found.couples
    assert (two.names, two.items, two.same) == (("anna", "ben"), 16, 0.0)


def shares(judge: Share | None, each_other: Share | None = None):
    people = read_people(Path("nowhere"), [], "ppo", "")
    return people._replace(judge=judge, each_other=each_other)


def test_how_far_to_trust_a_judge():
    assert trust(shares(None)) is None
    assert "contradict this judge" in trust(shares(Share(0.2, 0.1, 0.4, 50, 50)))
    assert "do not show" in trust(shares(Share(0.6, 0.45, 0.7, 50, 50)))
    better = Share(0.7, 0.6, 0.8, 90, 90)
    assert "A second person" in trust(shares(better))
    assert "less than they agree with each other" in trust(shares(better, Share(0.9, 0.8, 0.95, 40, 40)))
    assert "about as well as" in trust(shares(better, Share(0.75, 0.6, 0.9, 40, 40)))


# --------------------------------------------------------------------------------------------------------------- report


@pytest.mark.parametrize(
    ("won", "kind", "headline"),
    [
        (36, "preferred", "People prefer the trained policy: it won 90.0 % of 40 comparisons with SFT"),
        (4, "disliked", "People prefer the answers from before: the policy won 10.0 % of 40 comparisons with SFT"),
        (21, "undecided", "People see no clear difference: the policy won 52.5 % of 40 comparisons with SFT"),
    ],
)
def test_where_nothing_says_what_is_true_people_lead(tmp_path, won, kind, headline):
    run = make_run(tmp_path / "run", "no_truth", videos=60)
    people_say(run, ["policy"] * won + ["sft"] * (40 - won))
    html = write(run).read_text(encoding="utf-8")
    text = text_of(run / "report.html")
    assert f'class="verdict {kind}"' in html and f"<h1>{headline}".replace(" %", "\u00a0%") in html
    assert "helped" not in text.lower()
    assert f"the policy won {won}, tied 0 and lost {40 - won}" in text and "What people say" in text
    assert "What can be said of the judge without a truth: asked in both orders, it names the same winner" in text


def people_say(run: Path, said: list[str]) -> None:
    """Verdicts on the policy's answers to the first videos of a fabricated run."""
    from rlaif_lite.report.folder import read_run
    from rlaif_lite.report.people import items_of

    items = items_of(run, read_run(run).rows, "ppo")
    rows = [
        {"run": HASH, "person": "anna", "source": "policy", "item": item.id, "video": item.key, "better": better}
        for item, better in zip(items[: len(said)], said, strict=True)
    ]
    (run / "labels").mkdir()
    (run / "labels" / "anna.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_truth_leads_where_it_is_known(tmp_path):
    run = make_run(tmp_path / "run", "hacked", videos=60)
    people_say(run, ["policy"] * 40)
    text = text_of(write(run))
    assert "Reward hacking: the reward rose while the answers got worse" in text
    assert "the policy won 40, tied 0 and lost 0. Its win rate is 100.0 % (91.2 to 100.0 %)" in text


def test_without_people_nothing_is_said_of_them(tmp_path):
    text = text_of(write(make_run(tmp_path / "run", "no_truth", videos=10)))
    assert "Whether the answers got better, this data cannot say" in text and "People" not in text


# --------------------------------------------------------------------------------------------------------------- export


def test_what_people_decided_is_exported_as_pairs(store, run, tmp_path):
    judged = store.of("judged")
    judge_all(store, "anna", "judged", for_role("rejected"), most=10)
    judge_all(
        store, "ben", "judged", lambda shown: "tie" if shown.item is judged[0] else for_role("rejected")(shown), most=4
    )
    judge_all(
        store, "cleo", "judged", lambda shown: "skip" if shown.item is judged[1] else for_role("chosen")(shown), most=2
    )
    judge_all(store, "anna", "policy", for_role("policy"), most=3)
    done = CliRunner().invoke(app, ["ui", str(run), "--export", str(tmp_path / "pairs.jsonl")])
    assert done.exit_code == 0, done.output
    assert "9 pairs for `data.pairs`. Left out: 1 undecided, 3 about held-out videos." in done.stdout
    read = read_records(tmp_path / "pairs.jsonl")
    assert read.format == "record" and len(read.records) == 9
    by_id = {record.id: record for record in read.records}
    for item in judged[1:10]:
        record = by_id[f"{item.key}/{item.id}"]
        assert (record.rejected, record.chosen) == item.answers  # people turned the judge's verdict round
        assert Path(record.video).is_absolute() and Path(record.video).is_file()
        assert record.messages[-1].role == "user" and "<video>" in record.messages[-1].content
    given = ["data.preference=[]", f"data.pairs=[{tmp_path / 'pairs.jsonl'}]", f"output={tmp_path / 'next'}"]
    learnt = read_pairs(Workspace(load_recipe(run / "recipe.yaml", given)))  # what a reward model trains on
    assert [pair[1:] for pair in learnt] == [item.answers[::-1] for item in judged[1:10]]
    again = store.export(tmp_path / "all.jsonl", held_out=True)
    assert again == (12, 1, 0) and len(read_records(tmp_path / "all.jsonl").records) == 12


def test_nothing_decided_is_nothing_exported(store, run, tmp_path):
    judge_all(store, "anna", "judged", lambda shown: "tie", most=2)
    with pytest.raises(RlaifError, match="people decided no pair, 2 items are undecided, and 0 are about held-out"):
        store.export(tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()


def test_the_page_without_gradio_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "rlaif_lite.ui.page", raising=False)
    done = CliRunner().invoke(app, ["ui", str(run)])
    assert done.exit_code == 2 and "The page needs Gradio. Install it with `pip install rlaif-lite[ui]`." in done.stderr

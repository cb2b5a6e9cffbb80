"""The page on which people judge, in a real browser: keys, reload, two pages, videos that do not play, hostile text.

Needs the extra `ui`, playwright and a Chromium. `make test-ui` installs the first two."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the extra `ui` is not installed")
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium or Chrome is installed", allow_module_level=True)

import av  # noqa: E402
import numpy as np  # noqa: E402

from labelled import labelled_run  # noqa: E402
from rlaif_lite.report.folder import read_run  # noqa: E402
from rlaif_lite.ui import page as pages  # noqa: E402
from rlaif_lite.ui import show  # noqa: E402
from rlaif_lite.ui.store import Store  # noqa: E402

HOSTILE = '<img src=x onerror="window.hacked = 1"> ${window.hacked = 2} {{7*7}} <b>bold</b>'


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def run(tmp_path, world) -> Path:
    """A run on a copy of the world, whose test videos are: most as they are, one in a codec that no browser plays, one
    a folder's worth of noise that nothing decodes."""
    copy = shutil.copytree(world, tmp_path / "world")
    mpeg4(copy / "videos/test/00001.mp4")
    (copy / "videos/test/00002.mp4").write_bytes(bytes(range(256)) * 20)
    return labelled_run(tmp_path / "run", copy)


def mpeg4(path: Path) -> None:
    """MPEG-4 Part 2, which decoders here read and browsers do not."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        for shade in range(0, 250, 25):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def open_page(run, browser):
    """open_page() -> a page in a browser without memory; open_page(context) -> one more page in the same browser. The
    server starts with the first."""
    opened, served = [], []

    def one(context=None):
        served[:] = served or [pages.serve(run, "127.0.0.1", None, share=False, block=False)]
        context = context or browser.new_context(viewport={"width": 1240, "height": 1000})
        tab = context.new_page()
        opened.append(context)
        tab.wrong, tab.asked = [], []
        tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
        tab.on("request", lambda request: tab.asked.append(request.url))
        tab.goto(served[0])
        tab.get_by_label("Your name").wait_for()
        return tab

    yield one
    for context in opened:
        context.close()
    pages.gr.close_all(verbose=False)


def sign_in(tab, name: str) -> None:
    tab.get_by_label("Your name").fill(name)
    tab.get_by_label("Your name").press("Enter")
    tab.wait_for_selector("[data-item]")


def shown(tab) -> str:
    return tab.get_attribute("[data-item]", "data-item")


def press(tab, key: str) -> str:
    """Press a key and wait for the next item -> the item that was judged."""
    item = shown(tab)
    tab.keyboard.press(key)
    tab.wait_for_function("old => document.querySelector('[data-item]')?.dataset.item !== old", arg=item)
    return item


def labels(run: Path, person: str) -> list[dict]:
    text = (run / "labels" / f"{person}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_ten_items_with_a_reload_in_the_middle(run, open_page):
    tab = open_page()
    tab.get_by_text("Pairs that the judge decided").click()
    sign_in(tab, "Anna")
    done, keys = [], "1t2s112t1s"
    for number, key in enumerate(keys):
        done.append(press(tab, key))
        assert [row["item"] for row in labels(run, "Anna")] == done  # on the disk before the next is shown
        if number == 4:
            tab.reload()
            tab.wait_for_selector("[data-item]")  # by the name that the browser kept
            assert tab.get_by_label("Your name").input_value() == "Anna"
            assert tab.get_by_text("Anna: 0 of 8 judged.").is_visible()  # of the first source
            tab.get_by_text("Pairs that the judge decided").click()
            tab.get_by_text("Anna: 5 of 16 judged.").wait_for()
    assert len(set(done)) == 10
    for row, key in zip(labels(run, "Anna"), keys, strict=True):
        other = {"chosen": "rejected", "rejected": "chosen"}[row["first"]]
        assert row["better"] == {"1": row["first"], "2": other, "t": "tie", "s": "skip"}[key]
    press(tab, "b")
    assert shown(tab) == done[-1] and tab.get_by_text("Anna: 9 of 16 judged.").is_visible()
    people = read_run(run).people
    assert people.verdicts == {"Anna": 8} and people.judge.verdicts == 6
    assert not tab.wrong
    assert not [url for url in tab.asked if not url.startswith(("data:", "blob:", "http://127.0.0.1"))]


def test_what_the_page_says_is_not_told_apart_by_what_it_sends(run, open_page):
    """Blind: nothing that reaches the browser names a role, and both answers are there as they are."""
    tab = open_page()
    tab.get_by_text("Pairs that the judge decided").click()
    sign_in(tab, "Anna")
    card = tab.inner_html("#label-item")
    assert not [word for word in ("chosen", "rejected", "margin", "sft", "ppo") if word in card]
    assert "good &lt;" in card and "bad &amp; worse" in card


def test_two_pages_of_one_person_and_a_second_person(run, open_page):
    one = open_page()
    sign_in(one, "Anna")
    two = open_page(one.context)  # the name is known there too
    two.wait_for_selector("[data-item]")
    assert shown(one) == shown(two)
    first = press(one, "1")
    assert press(two, "2") == first
    assert two.get_by_text("That item was judged on another page already. Anna: 1 of 8 judged.").is_visible()
    press(two, "2")
    assert [row["item"] for row in labels(run, "Anna")] == [first, labels(run, "Anna")[1]["item"]]
    ben = open_page()  # another browser
    sign_in(ben, "Ben")
    assert shown(ben) == first
    press(ben, "t")
    assert read_run(run).people.verdicts == {"Anna": 2, "Ben": 1}


def test_a_key_that_is_held_or_hit_twice_judges_one_item(run, open_page):
    tab = open_page()
    sign_in(tab, "Anna")
    first = shown(tab)
    for _ in range(4):
        tab.keyboard.press("1", delay=0)
    tab.wait_for_function("old => document.querySelector('[data-item]')?.dataset.item !== old", arg=first)
    tab.wait_for_timeout(500)
    assert [row["item"] for row in labels(run, "Anna")] == [first]
    tab.get_by_label("Your name").click()
    tab.keyboard.press("2")  # typed into a field
    tab.wait_for_timeout(300)
    assert len(labels(run, "Anna")) == 1 and tab.get_by_label("Your name").input_value() == "Anna2"


def test_videos_that_do_not_play_are_shown_as_their_frames(run, open_page):
    tab = open_page()
    sign_in(tab, "Anna")
    seen = {}
    for _ in range(8):
        tab.wait_for_function(SEEN)
        seen[labels_key(run, shown(tab))] = tab.evaluate(SEEN)
        tab.keyboard.press("s")
        tab.wait_for_function("old => document.querySelector('[data-item]')?.dataset.item !== old", arg=shown(tab))
    assert seen.pop("test/00001") == "frames 1080"
    assert "00002.mp4" in seen.pop("test/00002")
    assert set(seen.values()) == {"plays 64"} and len(seen) == 6
    assert tab.get_by_text("All 8 items are judged.").is_visible()


SEEN = """() => {
  const box = document.querySelector("[data-item]");
  const video = box?.querySelector("video"), strip = box?.querySelector("img.strip");
  if (video) return video.videoWidth ? `plays ${video.videoWidth}` : null;
  if (strip) return strip.naturalWidth ? `frames ${strip.naturalWidth}` : null;
  return box?.textContent.includes("cannot be shown") ? box.textContent : null;
}"""


def labels_key(run: Path, item: str) -> str:
    return Store(run).items[item].key


def test_pairs_say_why_and_text_is_text(run, open_page):
    path = run / "preference" / "pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"chosen": HOSTILE, "margin": 9.0, "said": [[[HOSTILE, 0.75, 0.05]], rows[0]["said"][1]]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tab = open_page()
    tab.get_by_role("tab", name="Pairs").click()
    tab.locator("#pairs span", has_text="preference/00000").first.click()
    tab.wait_for_selector("#pair .item")
    text = tab.inner_text("#pair")
    assert HOSTILE in text and "75.0\u00a0%, no 5.0\u00a0%" in text and "Margin +9.00" in text
    assert "bad & worse . 20.0\u00a0%, no 70.0\u00a0%" in text and "nobody yet" in text
    assert tab.evaluate("window.hacked") is None and not tab.wrong
    tab.get_by_label("the shorter answer won").check()
    tab.get_by_label("number input for Margin at least").fill("1")
    tab.locator("#pairs").get_by_text("9", exact=True).first.wait_for(state="detached")  # the longest answer's margin
    assert tab.locator("#pairs span", has_text="1.5").first.is_visible()


def test_pairs_are_filtered_by_margin_length_and_people(run):
    store = Store(run)
    of = lambda least=0.0, *only: [row[-1] for row in show.rows(store, least, only)]
    assert len(of()) == 16 and len(of(1.0)) == 8 and of(2.0) == []
    assert [row[1] for row in show.rows(store, 0.0, [])] == [1.5] * 8 + [0.5] * 8  # the surest first
    assert of(0.0, show.SHORTER) == of() and of(0.0, show.LONGER) == of(0.0, show.DISAGREE) == []
    first = store.next_item("anna", "judged")
    store.add("anna", first.item.id, str(1 + first.roles.index("rejected")))
    assert of(0.0, show.DISAGREE) == [first.item.id]


def test_a_file_that_is_not_a_runs_video_cannot_be_fetched(run, open_page):
    tab = open_page()
    root = tab.url.rstrip("/")
    for path in ("video/recipe.yaml", f"gradio_api/file={run / 'recipe.yaml'}", "video/..%2F..%2Fetc%2Fpasswd"):
        assert tab.request.get(f"{root}/{path}").status in (403, 404), path


def test_two_roles_answer_side_by_side(finished, browser):
    """Chat on a real run: what `rlaif-lite chat` says is what the page says."""
    from rlaif_lite.chat import Chat

    folder = Path(finished.output)
    tab = browser.new_page()
    tab.goto(pages.serve(folder, "127.0.0.1", None, share=False, block=False))
    tab.get_by_role("tab", name="Chat").click()
    tab.get_by_role("button", name="Ask both").click()
    tab.get_by_text("Choose a video, or give a file.").wait_for()
    tab.get_by_label("A video of the run").click()
    tab.keyboard.type("test/00003")
    tab.keyboard.press("Enter")
    tab.get_by_label("Left").click()
    tab.get_by_role("option", name="base").click()
    tab.get_by_role("button", name="Ask both").click()
    tab.wait_for_selector("#answers .item", timeout=120_000)
    chat = Chat(folder)
    features = chat.look(str(folder / "data/videos/test/00003.mp4"))
    expected = [chat.ask(features, role, "describe the video") for role in ("base", "policy")]
    assert [card.inner_text().split("\n", 1)[1] for card in tab.locator("#answers .answer").all()] == expected
    tab.close()
    pages.gr.close_all(verbose=False)

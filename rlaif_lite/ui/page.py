"""The page itself, in Gradio: Label, Pairs, Chat. What it keeps is in `store`, what it looks like in `show`.

It listens on this machine alone unless asked for more, loads nothing from other hosts, and sends no figures of use.
"""

import math
import os
import threading
import time
from pathlib import Path

from ..errors import RlaifError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
try:
    import gradio as gr
except ImportError:
    raise RlaifError("The page needs Gradio. Install it with `pip install rlaif-lite[ui]`.") from None

from ..chat import Chat
from ..report.people import SKIP, TIE
from ..rollout import Sampling
from . import show
from .media import Media
from .store import Store

HERE = Path(__file__).parent
BUTTONS = {
    "one": ("1 is better  [1]", "1"),
    "two": ("2 is better  [2]", "2"),
    "tie": ("Tie  [t]", TIE),
    "skip": ("Skip  [s]", SKIP),
}
ROLES = ("base", "sft", "reference", "policy")


class Talk:
    """Chat on a page: the base is loaded at the first question, and one question is answered at a time."""

    def __init__(self, run: Path):
        self.run = run
        self.chat: Chat | None = None
        self.lock = threading.Lock()

    def ask(self, video, question: str, roles: tuple[str, str], sampling: Sampling, seed: int) -> str:
        """HTML with both roles' answers."""
        started = time.monotonic()
        with self.lock:
            self.chat = self.chat or Chat(self.run)
            features = self.chat.look(video)
            found = [(role, self.chat.ask(features, role, question, sampling, seed)) for role in roles]
        return show.answers(found, time.monotonic() - started)


def build(store: Store, media: Media) -> gr.Blocks:
    """The page of a run."""
    with gr.Blocks(title=f"{store.recipe.name}, judged by people", analytics_enabled=False) as page:
        with gr.Tab("Label"):
            _label(page, store, media)
        if "judged" in store.sources():
            with gr.Tab("Pairs"):
                _pairs(page, store, media)
        with gr.Tab("Chat"):
            _chat(store, media)
    return page


def _label(page: gr.Blocks, store: Store, media: Media) -> None:
    """Two answers to one question, blind."""
    sources = [(show.TITLES[source], source) for source in store.sources()]
    kept = gr.BrowserState("", storage_key="rlaif-lite-person", secret="no secret")  # a name, so that a reload goes on
    with gr.Row():
        name = gr.Textbox(label="Your name", info="Verdicts are kept under it.", max_lines=1, scale=1)
        source = gr.Radio(sources, value=sources[0][1], label="What to judge", scale=2)
    status, item = gr.Markdown("Write your name and press Enter."), gr.HTML(elem_id="label-item")
    shown = gr.Textbox(visible="hidden")  # the item as THIS page shows it: a late click is about what was seen
    with gr.Row(elem_classes="said"):
        buttons = {
            each: gr.Button(text, elem_id=f"say-{each}", variant="primary" if said in "12" else "secondary")
            for each, (text, said) in BUTTONS.items()
        }
        back = gr.Button("Back  [b]", elem_id="say-back")
    outputs = [name, status, item, shown]

    def ask(person: str, of: str, remark: str = "") -> list:
        done, total = store.progress(person, of)
        following = store.next_item(person, of)
        text = f"{remark}{person}: {done} of {total} judged."
        if following is None:
            return [person, text, show.finished(total), ""]
        return [person, text, show.item(following, media), following.item.id]

    def start(person: str, of: str):
        if not person.strip():  # a fresh page; somebody may be typing already
            return [gr.skip()] * 5
        person = _said(store.person, person)
        return [*_said(ask, person, of), person]

    def say(said: str):
        def one(person: str, of: str, item_id: str) -> list:
            if not item_id:
                return _said(ask, _said(store.person, person), of)
            person = _said(store.person, person)
            new = _said(store.add, person, item_id, said)
            return _said(ask, person, of, "" if new else "That item was judged on another page already. ")

        return one

    def undo(person: str, of: str) -> list:
        person = _said(store.person, person)
        return _said(ask, person, of, "" if _said(store.back, person, of) else "There is nothing to take back. ")

    leave = "(...given) => { document.activeElement.blur(); return given; }"  # or keys would go into the name
    name.submit(start, [name, source], [*outputs, kept], api_name="start", js=leave)
    source.change(start, [name, source], [*outputs, kept], api_visibility="private")
    page.load(start, [kept, source], [*outputs, kept], api_visibility="private")
    for each, (_, said) in BUTTONS.items():
        buttons[each].click(say(said), [name, source, shown], outputs, api_name=each, show_progress="hidden")
    back.click(undo, [name, source], outputs, api_name="back", show_progress="hidden")


def _pairs(page: gr.Blocks, store: Store, media: Media) -> None:
    """What the judge said, and why."""
    largest = max(item.row["margin"] for item in store.of("judged"))
    gr.Markdown("What the judge decided, and why. This is not blind: label first.")
    with gr.Row():
        least = gr.Slider(0, math.ceil(10 * largest) / 10, 0, step=0.1, label="Margin at least")
        only = gr.CheckboxGroup([show.DISAGREE, show.LONGER, show.SHORTER], label="Only where")
    table = gr.Dataframe(
        headers=list(show.COLUMNS),
        value=lambda: show.rows(store, 0.0, []),
        interactive=False,
        max_height=260,
        column_widths=["20%", "10%", "12%", "12%", "16%", "30%", "160px"],
        elem_id="pairs",
    )
    detail = gr.HTML(elem_id="pair")

    def choose(rows, event: gr.SelectData) -> str:
        return show.pair(store, store.items[event.row_value[-1]], media)

    for each in (least, only):
        each.change(lambda *asked: show.rows(store, *asked), [least, only], table, api_name="pairs")
    table.select(choose, table, detail, api_visibility="private")


def _chat(store: Store, media: Media) -> None:
    """One question to two roles."""
    talk, limit = Talk(store.folder), store.recipe.evaluate.max_new_tokens
    videos = {store.work.name_of(record): record.video for record in store.records.values() if record.video is not None}
    with gr.Row():
        with gr.Column():
            known = gr.Dropdown(sorted(videos), value=None, label="A video of the run", filterable=True)
            file = gr.File(label="or a file", file_types=["video"], height=140)
            seen = gr.HTML(elem_classes="item")
        with gr.Column():
            question = gr.Textbox("describe the video", label="Question", lines=2)
            with gr.Row():
                left = gr.Dropdown(ROLES, value="sft", label="Left")
                right = gr.Dropdown(ROLES, value="policy", label="Right")
            with gr.Row():
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 is greedy")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p")
            with gr.Row():
                longest = gr.Number(limit, minimum=1, precision=0, label="Most new tokens")
                seed = gr.Number(0, minimum=0, precision=0, label="Seed")
            send = gr.Button("Ask both", variant="primary")
            found = gr.HTML(elem_id="answers")

    def chosen(name, path):
        return path or videos.get(name)

    def ask(name, path, asked, one, other, heat, p, tokens, drawn):
        video = chosen(name, path)
        if video is None:
            raise gr.Error("Choose a video, or give a file.", print_exception=False)
        return _said(talk.ask, video, asked, (one, other), Sampling(int(tokens), heat, p), int(drawn))

    for each in (known, file):
        each.change(
            lambda *given: media.element(chosen(*given)) if any(given) else "",
            [known, file],
            seen,
            api_visibility="private",
        )
    inputs = [known, file, question, left, right, temperature, top_p, longest, seed]
    send.click(ask, inputs, found, api_name="ask")
    question.submit(ask, inputs, found, api_visibility="private")


def _said(function, *given):
    """A call whose message, where the input is at fault, the page shows."""
    try:
        return function(*given)
    except RlaifError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from None


def serve(run: Path, host: str, port: int | None, share: bool, block: bool = True) -> str:
    """Open the page of a run and return its address; with `block`, only when it is stopped.

    Raises RlaifError where the port is taken, and as `Store`."""
    store = Store(run)
    media = Media(store.recipe.features.max_source_pixels)
    system = ["system-ui", "sans-serif"]  # a theme's own fonts would be fetched from another host
    page = build(store, media)
    try:
        _, address, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"]),
            css=(HERE / "page.css").read_text(encoding="utf-8"),
            head=f"<script>{(HERE / 'keys.js').read_text(encoding='utf-8')}</script>",
            app_kwargs={"routes": media.routes()},
        )
    except OSError as error:
        raise RlaifError(f"The page cannot be opened on {host}: {error} Give another --port.") from None
    print(f"{store.folder}: {public or address}  (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return address

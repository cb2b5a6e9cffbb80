"""Videos for a browser: the file itself where the browser plays it, else a strip of its frames, made when asked for.

Only what the page shows can be fetched: a video is named by a digest of its path, and no other file has a name.
"""

import hashlib
import html
import io
from pathlib import Path

from PIL import Image
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..data.splits import Video
from ..errors import RlaifError
from ..video.strip import strips

PLAYED = (".mp4", ".webm", ".mov", ".m4v", ".ogv")  # containers that browsers open; the codec is the browser's to say
HEIGHT = 180  # pixels of a strip
KEPT = 200  # strips in memory

# A browser that knows the container and not the codec fails, or plays sound alone: then the strip takes its place.
PLAYER = (
    '<video controls autoplay loop muted playsinline src="/video/{name}" '
    'onerror="this.outerHTML=this.dataset.strip" onloadedmetadata="if (!this.videoWidth) this.onerror()" '
    'data-strip="{strip}"></video>'
)
STRIP = (
    '<img class="strip" src="/strip/{name}.png" alt="Frames of the video" '
    'onerror="fetch(this.src).then(r => r.text()).then(t => this.replaceWith(t))">'
)


class Media:
    """The videos that a page has shown."""

    def __init__(self, frame_limit: int):
        """`frame_limit`: pixels of a frame above which a video is refused."""
        self.frame_limit = frame_limit
        self.videos: dict[str, Video] = {}
        self.made: dict[str, bytes] = {}

    def routes(self) -> list[Route]:
        """What the server answers besides the page."""
        return [Route("/video/{name}", self.play), Route("/strip/{name}.png", self.strip)]

    def element(self, video: Video | None) -> str:
        """HTML that shows a video."""
        if video is None:
            return '<p class="none">This record has no video.</p>'
        name = hashlib.sha256(repr(video).encode()).hexdigest()[:20]
        self.videos[name] = video
        strip = STRIP.format(name=name)
        plays = isinstance(video, str) and video.lower().endswith(PLAYED) and Path(video).is_file()
        return PLAYER.format(name=name, strip=html.escape(strip)) if plays else strip

    def play(self, request: Request) -> Response:
        """The video's file, by ranges."""
        video = self.videos.get(request.path_params["name"])
        if not isinstance(video, str) or not Path(video).is_file():
            return PlainTextResponse("There is no such video.", 404)
        return FileResponse(video)

    def strip(self, request: Request) -> Response:
        """The video's frames as a PNG, or why there are none."""
        name = request.path_params["name"]
        if name not in self.videos:
            return PlainTextResponse("There is no such video.", 404)
        if name not in self.made:
            try:
                ((_, found),) = strips({name: self.videos[name]}, 1, self.frame_limit, HEIGHT)
            except RlaifError as error:
                found = error
            if isinstance(found, RlaifError):
                said = str(found).replace(name, Path(str(self.videos[name])).name)
                return PlainTextResponse(f"This video cannot be shown: {said}", 415)
            file = io.BytesIO()
            Image.fromarray(found).save(file, "PNG")
            self.made[name] = file.getvalue()
            if len(self.made) > KEPT:
                self.made.pop(next(iter(self.made)))
        return Response(self.made[name], media_type="image/png")

"""
The app in a real browser, from the folder that is a Space: what is typed and clicked finds the right photo first, by
mouse, by keys and on a phone. Skipped without Gradio, Selenium, or Chromium and its driver; `make test-app`
brings them.
"""

import base64
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trained_world
from PIL import Image
from places import EXAMPLES, ROOT

pytest.importorskip("gradio", reason="the app needs Gradio: make test-app")
pytest.importorskip("selenium", reason="a browser is driven by Selenium: make test-app")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver", allow_module_level=True)

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from unicoder_vl_hf import cli
from unicoder_vl_hf.app import FOUND, PhotoApp

PATIENCE = 60  # seconds, of a busy machine
SHOTS = os.environ.get("SCREENSHOTS")  # a folder, for those who want to look
# A detector of one's own, beside the app: it knows each scene again, and gives the regions that were stored of it.
DETECTOR = """
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from unicoder_vl_hf import RegionStore

HERE = Path(__file__).parent


class Known:
    def __init__(self, *, device, precision):
        self.store, self.provenance = RegionStore(HERE / "regions"), {"detector_revision": "1"}
        self.photos = {path.stem: self.prepare(Image.open(path)) for path in (HERE / "photos").iterdir()}

    def prepare(self, image):
        return np.asarray(image.convert("RGB").resize((64, 48)), dtype=float)

    def __call__(self, prepared, image_ids, boxes=None):
        for photo, image_id in zip(prepared, image_ids, strict=True):
            nearest = min(self.photos, key=lambda name: abs(self.photos[name] - photo).mean())
            yield replace(self.store[nearest], image_id=image_id)
"""


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    """The folder of the example with what it searches: a small model that knows ten scenes."""
    folder = trained_world.build(tmp_path_factory.mktemp("trained"))
    space = shutil.copytree(EXAMPLES / "app", tmp_path_factory.mktemp("app") / "space")
    (space / "detector.py").write_text(DETECTOR)
    app, last = (space / "app.py").read_text(), 'beside("captions.index"),'
    assert last in app
    (space / "app.py").write_text(app.replace(last, f'{last} detector="detector:Known",'))
    (space / "model").symlink_to(folder / "model")
    for name in ("regions", "photos"):
        (space / name).symlink_to(folder / "world" / name)
    words = ["index", space / "regions", "--model", space / "model", "--output", space / "captions.index"]
    words += ["--captions", folder / "world" / "captions.jsonl", "--split", "train"]
    assert cli.main(list(map(str, words))) == 0
    return space


@pytest.fixture(scope="module")
def captions(space) -> dict[str, set[str]]:
    """The captions of each image that the model knows."""
    found: dict[str, set[str]] = {}
    for image_id, caption in trained_world.captions((space / "regions").resolve().parent):
        found.setdefault(image_id, set()).add(caption)
    return found


@pytest.fixture(scope="module")
def address(space):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = os.environ | {"PYTHONPATH": str(ROOT / "src"), "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    with open(space / "log.txt", "w") as log:
        process = subprocess.Popen([sys.executable, space / "app.py"], env=variables, stdout=log, stderr=log)
    try:
        for _ in range(10 * PATIENCE):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (space / "log.txt").read_text()
            time.sleep(0.5)
        else:
            raise TimeoutError((space / "log.txt").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(params=[1200, 390], ids=["desktop", "phone"])
def width(request) -> int:
    return request.param


@pytest.fixture
def browser(address, width, request):
    options = ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    phone = {"deviceMetrics": {"width": width, "height": 844, "pixelRatio": 1.0}, "userAgent": "phone"}
    if width < 600:
        options.add_experimental_option("mobileEmulation", phone)
    else:
        options.add_argument(f"--window-size={width},1000")
    driver = Chrome(options=options, service=ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(address)
        yield driver
        if SHOTS is not None:
            driver.save_screenshot(f"{SHOTS}/{request.node.name}.png")
    finally:
        driver.quit()


def wait(browser, condition):
    """Waits until a condition of the page holds, and gives it."""
    return WebDriverWait(browser, PATIENCE, ignored_exceptions=(Exception,)).until(lambda _: condition())


def shown(browser, selector: str, text: str = ""):
    """The elements on the page that are visible and hold a text."""
    found = browser.find_elements(By.CSS_SELECTOR, selector)
    return [element for element in found if element.is_displayed() and text in element.text]


def one(browser, selector: str, text: str = ""):
    return wait(browser, lambda: shown(browser, selector, text)[0])


def field(browser, label: str):
    """The text field beneath a label."""
    return one(browser, "label", label).find_element(By.CSS_SELECTOR, "textarea, input")


def press(browser, selector: str, text: str):
    """Clicks as a person does: what is clicked must be in view, with nothing on top."""
    element = one(browser, selector, text)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    wait(browser, lambda: element.click() or True)


def open_tab(browser, name: str):
    """Opens a tab; on a phone the last ones are in a menu."""
    menu = ".overflow-menu > button"
    wait(browser, lambda: shown(browser, "button[role=tab]", name) or shown(browser, menu))
    if not shown(browser, "button[role=tab]", name):
        press(browser, menu, "")
    press(browser, "button[role=tab], .overflow-dropdown button", name)


def first_found(browser, image_id: str):
    """The first photo that was found, once it is this one."""
    first = shown(browser, "button.thumbnail-item")[0]
    return first if first.text.endswith(image_id) else None


def in_view(browser, selector: str) -> bool:
    """Whether the top of an element comes into view, in the upper half where not all of the element is."""
    seen = """
        const box = arguments[0].getBoundingClientRect(), height = window.innerHeight;
        return box.top > -20 && (box.top < height / 2 || box.bottom <= height);
    """
    return wait(browser, partial(browser.execute_script, seen, one(browser, selector)))


def fits(browser) -> bool:
    """Whether nothing has to be scrolled sideways."""
    return browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_a_sentence_finds_its_photo_first_and_a_click_says_why(browser, captions, width):
    for image_id in list(captions)[:2]:
        typed = field(browser, "What should the photos show?")
        assert typed.size["width"] > 200  # so that a sentence can be read, on a phone, too
        typed.clear()
        caption = min(captions[image_id])
        typed.send_keys(caption)
        press(browser, "button.primary", "Search")
        first = wait(browser, partial(first_found, browser, image_id))
        assert first.text.startswith("1. +")
        assert len(shown(browser, "button.thumbnail-item")) == FOUND
        assert one(browser, "p", "Ordered by score")
        picture = first.find_element(By.TAG_NAME, "img")
        assert wait(browser, partial(browser.execute_script, "return arguments[0].naturalWidth", picture)) == 192
    press(browser, "button.thumbnail-item", "1. +")
    figures = wait(browser, lambda: shown(browser, ".explanation figure"))
    words = [figure.text.split("\n")[0] for figure in figures[1:]]
    assert one(browser, ".explanation .caption").text.split() == caption.split()
    assert "".join(words) == caption.replace(" ", "")
    assert one(browser, ".explanation", "score +") and in_view(browser, ".explanation") and fits(browser)


def test_keys_are_enough(browser, captions):
    caption = min(list(captions.values())[3])
    field(browser, "What should the photos show?").send_keys(caption + Keys.ENTER)
    first = one(browser, "button.thumbnail-item", "1. +")
    for _ in range(12):
        if browser.switch_to.active_element == first:
            break
        browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.switch_to.active_element == first
    first.send_keys(Keys.ENTER)
    assert one(browser, ".explanation", "score +")


def test_a_photo_finds_its_captions(browser, captions):
    open_tab(browser, "Search by photo")
    image_id = list(captions)[4]
    field(browser, "or the id of a stored one").send_keys(image_id)
    press(browser, "button.primary", "Find captions")
    found = wait(browser, lambda: shown(browser, ".captions li"))
    texts = [line.text.split(" ", 1)[1] for line in found]
    assert len(found) == FOUND and set(texts[:2]) == captions[image_id] and fits(browser)


def upload(browser, path: Path):
    """Gives a file to the page as the dialog of the browser does, and waits until the page shows it."""
    (tab,) = shown(browser, "[role=tabpanel]")
    tab.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(path))
    picture = one(browser, "[role=tabpanel] img")
    assert wait(browser, partial(browser.execute_script, "return arguments[0].naturalWidth", picture)) == 192


@pytest.fixture
def taken(space, captions, tmp_path) -> tuple[Path, str]:
    """A photo of one's own, a JPEG of a scene under another name, and the id of the scene."""
    image_id = list(captions)[6]
    with Image.open(space / "photos" / f"{image_id}.png") as scene:
        scene.convert("RGB").save(tmp_path / "holiday.jpg", quality=90)
    return tmp_path / "holiday.jpg", image_id


def test_an_uploaded_photo_finds_its_captions(browser, captions, taken):
    path, image_id = taken
    open_tab(browser, "Search by photo")
    upload(browser, path)
    press(browser, "button.primary", "Find captions")
    found = wait(browser, lambda: shown(browser, ".captions li"))
    texts = [line.text.split(" ", 1)[1] for line in found]
    assert set(texts[:2]) == captions[image_id] and in_view(browser, ".captions") and fits(browser)


def test_an_uploaded_photo_is_scored_and_explained_on_itself(browser, captions, taken):
    path, image_id = taken
    open_tab(browser, "Score a pair")
    upload(browser, path)
    field(browser, "Sentence").send_keys(min(captions[image_id]) + Keys.ENTER)
    assert one(browser, ".explanation", "score +") and in_view(browser, ".explanation") and fits(browser)
    source = one(browser, ".explanation .whole img").get_attribute("src").partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(source))) as drawn, Image.open(path) as photo:
        small, scene = (np.asarray(each.convert("L").resize((64, 48)), dtype=float) for each in (drawn, photo))
    assert np.corrcoef(small.ravel(), scene.ravel())[0, 1] > 0.5


def test_a_pair_is_scored_and_what_is_wrong_is_said(browser, captions):
    open_tab(browser, "Score a pair")
    image_id = next(iter(captions))
    field(browser, "Sentence").send_keys("a red circle")
    press(browser, "button.primary", "Score")
    assert one(browser, ".toast-body", "Give either a photo or the id of a stored one.")
    field(browser, "or the id of a stored one").send_keys(image_id)
    field(browser, "Sentence").send_keys(Keys.ENTER)
    assert one(browser, ".explanation", "score ") and fits(browser)
    # Also where the system is dark, the explanation is dark on white.
    browser.execute_script("document.body.classList.add('dark')")
    colour = one(browser, ".explanation p", "score ").value_of_css_property("color")
    assert max(map(int, re.findall(r"\d+", colour)[:3])) < 100


def test_a_store_is_browsed_with_its_boxes(browser, captions):
    open_tab(browser, "Browse")
    name = list(captions)[5]
    one(browser, "button.thumbnail-item", name)
    far = {"offline": False, "latency": 1000, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", far)  # the picture comes when its place was shown
    press(browser, "button.thumbnail-item", name)
    label = one(browser, "label", f"Regions of {name}")
    picture = label.find_element(By.XPATH, "..").find_element(By.TAG_NAME, "img")
    assert wait(browser, lambda: browser.execute_script("return arguments[0].naturalWidth", picture)) == 640
    assert in_view(browser, "#boxes") and fits(browser)


def test_nothing_is_fetched_from_elsewhere(browser, address):
    one(browser, "button", "Search")
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked and all(name.startswith((address, "data:", "blob:")) for name in asked), asked


def test_without_photos_pages_are_blank_but_for_boxes(space, tmp_path):
    app = PhotoApp(space / "model", space / "regions")
    assert app.names == list(app.store)
    photo = app.photo(app.names[0])
    assert photo.size == (640, 480) and photo.tobytes() == app.boxes(app.names[0]).tobytes()
    (tmp_path / "few").mkdir()
    shutil.copy(space / "photos" / f"{app.names[1]}.png", tmp_path / "few")
    few = PhotoApp(space / "model", space / "regions", tmp_path / "few")
    assert few.photo(app.names[0]).tobytes() == photo.tobytes() and few.photo(app.names[1]).size == (192, 144)
    with pytest.raises(ValueError, match=r"captions.index holds captions, but what is sought are images"):
        PhotoApp(space / "model", space / "regions", index=space / "captions.index")
    with pytest.raises(ValueError, match="The sentence is empty"):
        app.find(" ")

from .batching import Batcher as Batcher
from .reading import Limits as Limits, Photo as Photo
from .server import create_app as create_app, open_app as open_app, serve as serve

"""
Processes that tests start by multiprocessing's "forkserver" begin with these modules: a new interpreter would import
them for ten seconds. As with "spawn", what they work on reaches them as pickles and they inherit nothing else.
"""

import multiprocessing

multiprocessing.set_forkserver_preload(["pytest", "datasets", "transformers.trainer", "unicoder_vl_hf"])

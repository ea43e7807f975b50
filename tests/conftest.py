"""
Where a process would be spawned, tests fork it from one that has imported what it needs: a new interpreter would import
for ten seconds. What it works on reaches it as a pickle, as before, and it inherits nothing else.
"""

import multiprocessing

get_context = multiprocessing.get_context
multiprocessing.get_context = lambda method=None: get_context("forkserver" if method == "spawn" else method)
multiprocessing.set_forkserver_preload(["pytest", "datasets", "transformers.trainer", "unicoder_vl_hf"])

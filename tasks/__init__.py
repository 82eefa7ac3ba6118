"""The steps of a fine-tune, a folder each: plain Python beside one Prefect task.

Importing any step first sets this process up (`tasks.process`), because BLAS has to be loaded
before MLX and the quiet settings have to stand before Prefect and MLflow read them.
"""

from tasks.process import set_up_process

set_up_process()

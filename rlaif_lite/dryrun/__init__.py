"""A recipe at its real size without a GPU: the stages' own code on tensors that have shapes and no memory.

Tensors on the CPU are real. Those on "cuda" are FakeTensors, and a dispatch mode sees every operator on them
(`tracker.py`): what it holds, moves and computes, and what makes the host wait. `device.py` answers for the GPU where
the code asks it something; `cards.py` has the rates of real ones. `run.py` drives the stages.

All of it runs in a process of its own (`__main__.py`), because a torch without CUDA needs the shim before it starts.
"""

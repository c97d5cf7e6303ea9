"""Calls into the Triton kernels: the decoding step on a GPU, or in Triton's interpreter on the CPU."""


def selective_state_update(*args) -> None:
    """Advance the state by one step."""
    # imported here, for triton takes a second to load
    from ssmtune.triton_kernels.selective_state_update import selective_state_update_fwd

    selective_state_update_fwd(*args)

"""Flow runs whose process was killed: Prefect (3.8.8) leaves them RUNNING, as nobody told it otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID


def mark_crashed(flow_run_ids: Sequence[str], reason: str) -> int:
    """End these flow runs, their tasks and subflows, as far as they have not ended; how many flow runs."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterId,
        FlowRunFilterParentFlowRunId,
        TaskRunFilter,
        TaskRunFilterFlowRunId,
    )
    from prefect.client.schemas.objects import State
    from prefect.states import Crashed

    state: State[None] = Crashed(message=reason)
    ended = 0
    ids = [UUID(text) for text in flow_run_ids if text]
    with get_client(sync_client=True) as client:
        while ids:
            these = FlowRunFilter(id=FlowRunFilterId(any_=ids))
            of_these = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=ids))
            below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=ids))
            for task_run in client.read_task_runs(task_run_filter=of_these):
                if task_run.state and not task_run.state.is_final():
                    client.set_task_run_state(task_run.id, state, force=True)
            for flow_run in client.read_flow_runs(flow_run_filter=these):
                if flow_run.state and not flow_run.state.is_final():
                    client.set_flow_run_state(flow_run.id, state, force=True)
                    ended += 1
            ids = [flow_run.id for flow_run in client.read_flow_runs(flow_run_filter=below)]
    return ended

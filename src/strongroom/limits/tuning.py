"""The numbers that the ledger is tuned by, each with what it trades. Pure.

Read them through the module (`tuning.MAX_WAITING`), so that a test that sets one changes it for every part.
"""

from __future__ import annotations

# --- Group commit ------------------------------------------------------------------------------------------------

MAX_WAITING = 50_000
"""Requests that may wait for a commit. More would fill the memory while the store is slow; the next one gets a 429."""
GATHER_PART = 0.5
"""The commit of an embedded store blocks the loop, so no request arrives meanwhile. The commit therefore waits for
this part of a commit's time while fewer requests wait than usual: latency against requests per commit."""
MAX_GATHER_S = 0.000_5
"""The longest such wait for single requests. A caller that is alone never waits."""
SAVED_S = 0.000_005
"""What a request costs less in this commit than in the next one. After rounds of thousands of requests (batches) the
wait may take so much for each one that is missing, since their clients need longer to ask again."""
GATHERED_PART = 0.8
"""The wait ends once this part of the usual number of requests is there: 1.0 would wait for stragglers each time."""
ANNOUNCED_PART = 1.0
"""A commit waits for batches that are announced for this part of a round's time. Batches that share a commit write each
usage document once; a round without them would cost as much again."""
MAX_ANNOUNCED_S = 0.05
"""The longest such wait, so that a single request does not pay for a large batch that is slow to arrive."""
SEPARATE_COMMITS = 50
"""After a conflict each group has a batch of its own for so many commits: one lost group does not cost the others a
second commit, but each group costs a commit of its own."""
MAX_BUNDLE_CHARS = 400_000
"""Groups share a batch until their states are this long together. More would be fewer commits, and nearer to the port's
MAX_BATCH_BYTES."""
MAX_ONCE = 400
"""Requests of one group with an operation of their own (idempotency, reservation) in one commit; with the rest they fit
into a batch of the port."""
MAX_GROUP_OPERATIONS = 450
"""Operations of one group in one commit, for the same reason."""
MAX_EVENT_CHARS = 400_000
"""Characters of events of crossed thresholds in one commit. The remaining events go into the next one."""

# --- Usage states in memory ----------------------------------------------------------------------------------------

MAX_USAGE_STATES = 30_000
"""Usage documents kept in memory: memory against reads of keys that come back."""
REREAD_AFTER_S = 0.25
"""A node is not told when others release or return units. A state with such amounts is read again after so
long: reads against denials for amounts that are free already."""

# --- Fairness between nodes ----------------------------------------------------------------------------------------

RETRY_FOR_S = 10.0
"""A request that other nodes keep overtaking is decided again for so long. Then its caller gets a 503."""
MAX_PAUSE_S = 0.02
"""The longest pause that gives other nodes their turn: latency here against starvation there."""
PAUSED_COMMITS = 16
"""After a lost race for a subject, a pause follows each of its next commits, so many times."""
FIRST_TURN_COMMITS = 16
"""A node that never loses a subject does not learn that another node cannot win it. It therefore pauses after so many
commits of the subject. The number doubles while no other node shows up: throughput against the wait of a newcomer."""
MAX_TURN_COMMITS = 128
"""The most commits between two such pauses."""
MAX_CONTENDED = 10_000
"""Subjects remembered as being charged by other nodes too."""

# --- Aggregation of keys without limits ------------------------------------------------------------------------------

AGGREGATE_FOR_S = 1.0
"""The use of keys without limits decides nothing. It is written at most this much later: how much use a crash loses
against writes."""
CLOSING_FLUSHES = 3
"""Flushes on close: what is there, what waited for that to be written, and what other nodes fought over."""
MAX_LOOKS = 5
"""Statistics are read again if a flush began meanwhile, at most so many times."""
LOOK_AGAIN_S = 0.002
"""Statistics look so often whether the write that they would miss is done. An event for each write would cost more."""
SHOWN_WITHOUT_S = 1.0
"""The longest that statistics wait for that write; another node may hold up its key."""

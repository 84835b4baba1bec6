// parallel.h - run independent tasks on OpenMP threads: torch's own pool where torch is loaded (see
// lepton_kernels/_runtime.py), so two pools never fight over the cores.
#pragma once

#include <functional>

namespace lepton {

// Calls task(i) once for every i in [0, count), on at most `threads` threads; serial in a child forked after the pool
// started (GNU OpenMP would hang there). Tasks are dealt out in order as threads become free. A task must not throw.
void parallel_for(int count, int threads, const std::function<void(int)>& task);

// Calls task(thread, team) once for every thread in [0, team), all at the same time, for tasks that wait for each other
// by team_barrier(). team is `threads` or fewer; 1 in a forked child. A task must not throw.
void parallel_team(int threads, const std::function<void(int thread, int team)>& task);

// Inside a task of parallel_team: waits until every thread of the team is here.
void team_barrier();

// How many threads torch, or OMP_NUM_THREADS, wants.
int default_threads();

}  // namespace lepton

// parallel.cpp - OpenMP behind one function, made safe after fork.
#include "cpu/parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace lepton {
namespace {

// Set in a forked child: libgomp's pool did not survive the fork, and its first parallel region would wait forever.
std::atomic<bool> in_forked_child{false};

const int registered = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

}  // namespace

void parallel_for(int count, int threads, const std::function<void(int)>& task) {
  threads = std::min(threads, count);
  if (threads <= 1 || in_forked_child || registered != 0) {
    for (int i = 0; i < count; ++i) task(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int i = 0; i < count; ++i) task(i);
}

void parallel_team(int threads, const std::function<void(int, int)>& task) {
  if (threads <= 1 || in_forked_child || registered != 0) {
    task(0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  task(omp_get_thread_num(), omp_get_num_threads());
}

void team_barrier() {
#pragma omp barrier
}

int default_threads() { return in_forked_child ? 1 : omp_get_max_threads(); }

}  // namespace lepton

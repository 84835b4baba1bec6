// parallel.cpp - OpenMP behind one function, made safe after fork.
#include "cpu/parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>

namespace lepton {
namespace {

// Set in a forked child: libgomp's pool did not survive the fork, and its first parallel region would wait forever.
std::atomic<bool> in_forked_child{false};

const int registered = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

// Where other processes hold the cores, a region waits at its end for a thread that does not get to run, for whole
// slices of the scheduler's time, though the tasks are long done. A caller that meets regions that took longer than all
// their tasks one after the other runs the next ones alone, and twice as many whenever it tries again in vain.
class Crowding {
 public:
  bool alone() { return alone_ > 0 && alone_-- > 0; }
  // Seconds that a region took, and that its tasks took together.
  void note(double region, double tasks) {
    if (region <= tasks + kPatience) {
      next_ = kFirst;
      return;
    }
    alone_ = next_;
    next_ = std::min(2 * next_, kMost);
  }

 private:
  static constexpr double kPatience = 500e-6;
  static constexpr int kFirst = 8, kMost = 1024;
  int alone_ = 0, next_ = kFirst;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

void parallel_for(int count, int threads, const std::function<void(int)>& task) {
  thread_local Crowding crowding;
  threads = std::min(threads, count);
  if (threads <= 1 || in_forked_child || registered != 0 || crowding.alone()) {
    for (int i = 0; i < count; ++i) task(i);
    return;
  }
  const double begin = now();
  double tasks = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(+ : tasks)
  for (int i = 0; i < count; ++i) {
    const double start = now();
    task(i);
    tasks += now() - start;
  }
  crowding.note(now() - begin, tasks);
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

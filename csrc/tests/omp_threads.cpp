// What the compiler asks of OpenMP, on std::thread and std::mutex alone: for builds with ThreadSanitizer, which does
// not see how libgomp makes threads wait and would call every barrier a race. Defined in the program, it goes before
// libgomp, so it must hold all that the kernels use.
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Loop {
  long next, end, step, chunk;
};

struct Team {
  explicit Team(int threads) : size(threads) {}
  const int size;
  std::mutex mutex;
  std::condition_variable all_here;
  int waiting = 0;
  long barriers = 0;
  std::map<long, Loop> loops;    // by how many a thread has met before
  std::map<long, bool> singles;  // the same
};

struct Member {
  Team* team = nullptr;
  int number = 0;
  long loops = 0, singles = 0;
};

thread_local Member self;

void wait_for_all(Team& team) {
  std::unique_lock<std::mutex> lock(team.mutex);
  const long mine = team.barriers;
  if (++team.waiting == team.size) {
    team.waiting = 0;
    ++team.barriers;
    team.all_here.notify_all();
    return;
  }
  team.all_here.wait(lock, [&] { return team.barriers != mine; });
}

bool take(Loop& loop, long* first, long* last) {
  if (loop.step > 0 ? loop.next >= loop.end : loop.next <= loop.end) return false;
  *first = loop.next;
  loop.next += loop.chunk * loop.step;
  const bool beyond = loop.step > 0 ? loop.next > loop.end : loop.next < loop.end;
  *last = beyond ? loop.end : loop.next;
  return true;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return self.number; }
int omp_get_num_threads() { return self.team ? self.team->size : 1; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  const Member before = self;
  Team team(threads ? static_cast<int>(threads) : 1);
  std::vector<std::thread> others;
  for (int number = 1; number < team.size; ++number) {
    others.emplace_back([&, number] {
      self = {&team, number, 0, 0};
      body(data);
    });
  }
  self = {&team, 0, 0, 0};
  body(data);
  for (std::thread& other : others) other.join();
  self = before;
}

void GOMP_barrier() {
  if (self.team) wait_for_all(*self.team);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  const std::lock_guard<std::mutex> lock(self.team->mutex);
  return take(self.team->loops.at(self.loops), first, last);
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* first, long* last) {
  const std::lock_guard<std::mutex> lock(self.team->mutex);
  Loop& loop = self.team->loops.emplace(++self.loops, Loop{start, end, step, chunk}).first->second;
  return take(loop, first, last);
}

void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}

bool GOMP_single_start() {
  const std::lock_guard<std::mutex> lock(self.team->mutex);
  return self.team->singles.emplace(++self.singles, true).second;
}

}  // extern "C"

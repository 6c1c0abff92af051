// SPDX-License-Identifier: Apache-2.0
/*
 * Crews of workers. A crew goes one way:
 *
 *	crew_new, crew_set_loop or crew_set_vcpu once for each worker, crew_start, (crew_stop, crew_interrupt,)
 *	crew_join, crew_free
 *
 * Functions return 0 or an errno. One thread at a time may use a crew.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"

#define STACK	(256 << 10)

/* Waiting for the moment to begin: sleep, then spin. When there are fewer CPUs than workers, give way to others in
 * between: one that spins for long keeps another from being there in time. When there are enough, giving way would
 * only let strangers in.
 */
#define SLEEP_UNTIL	3000000		/* ns before; a sleeper's CPU and timer are late by less, in the lab too */
#define YIELD_UNTIL	20000
#define NAP		10000000	/* longest sleep: a stop that comes just before it must not wait longer */
#define LOOK_AGAIN	200000		/* at a gate */
#define MEET_WITHIN	1000000000	/* ns; then a worker goes on without those who have not come */

const uint32_t native_sizes[] = {
	sizeof(struct record), sizeof(struct report), sizeof(struct board), sizeof(struct step), sizeof(struct plan),
};

/* --- a worker's thread --------------------------------------------------------------------------------------- */

static void sleep_until(const struct crew *crew, uint64_t when)
{
	uint64_t time;

	while (!stopped(crew) && (time = now()) < when) {
		struct timespec nap = { .tv_nsec = (long)(when - time < NAP ? when - time : NAP) };

		nanosleep(&nap, NULL);
	}
}

static void spin_until(const struct crew *crew, uint64_t when)
{
	uint64_t time;

	while (!stopped(crew) && (time = now()) < when)
		if (crew->crowded && when - time > YIELD_UNTIL)
			sched_yield();
}

/* Until the spinning begins each worker has a CPU of its own, as far as there are enough. The scheduler would wake two
 * of them on one, and take milliseconds to notice.
 */
static void settle(const struct worker *worker)
{
	const struct crew *crew = worker->crew;
	int left = (int)((worker - crew->workers) % CPU_COUNT(&crew->cpus));
	cpu_set_t own;

	CPU_ZERO(&own);
	for (size_t cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &crew->cpus) && left-- == 0)
			CPU_SET(cpu, &own);
	sched_setaffinity(0, sizeof(own), &own);
}

static void roam(const struct worker *worker)
{
	sched_setaffinity(0, sizeof(worker->crew->cpus), &worker->crew->cpus);
}

/* The moment that whoever has the other end of the memory writes into it, once everybody is ready. */
static uint64_t opened(const struct crew *crew)
{
	const struct timespec nap = { .tv_nsec = LOOK_AGAIN };
	uint64_t when;

	while (!(when = __atomic_load_n(&crew->gate->when, __ATOMIC_ACQUIRE)) && !stopped(crew))
		nanosleep(&nap, NULL);
	return when;
}

/* A worker that was not given its CPU in time would begin when a short call of the others is over. So all wait for each
 * other once more: who makes a single call before it, a loop when it is under way, after its first.
 */
void meet(const struct worker *worker)
{
	const struct crew *crew = worker->crew;
	struct gate *gate = crew->gate;
	const uint64_t limit = now() + MEET_WITHIN;

	__atomic_add_fetch(&gate->come, 1, __ATOMIC_ACQ_REL);
	while (__atomic_load_n(&gate->come, __ATOMIC_ACQUIRE) < gate->parties && !stopped(crew) && now() < limit)
		if (gate->parties > (uint32_t)CPU_COUNT(&crew->cpus))
			sched_yield();
}

static void pass_gate(struct worker *worker)
{
	struct crew *crew = worker->crew;
	const int pinned = worker->plan.cpu >= 0 || !CPU_COUNT(&crew->cpus);
	uint64_t when;

	if (!pinned)
		settle(worker);
	pthread_mutex_lock(&crew->lock);
	crew->ready++;
	pthread_cond_broadcast(&crew->changed);
	while (!crew->begin)
		pthread_cond_wait(&crew->changed, &crew->lock);
	pthread_mutex_unlock(&crew->lock);
	when = (crew->gate ? opened(crew) : crew->begin) + worker->plan.offset;
	sleep_until(crew, when > SLEEP_UNTIL ? when - SLEEP_UNTIL : 0);
	if (!pinned)
		roam(worker);
	spin_until(crew, when);
	if (crew->gate && makes_one_call(worker))
		meet(worker);
}

/* To interrupt a system call a signal needs a handler, without SA_RESTART, which need not do anything. The number is
 * one that neither the C library nor Python uses.
 */
static int kick_signal(void)
{
	return SIGRTMIN + 3;
}

/* What a storm of signals is made of (STORM_SIGNAL of chaos/vmm/harm.py). A vCPU lets it in: it is to come out of its
 * guest for one and go back. Whoever sends the first has a handler set before.
 */
static int storm_signal(void)
{
	return SIGRTMIN + 5;
}

static void do_nothing(int number)
{
	(void)number;
}

static void introduce(struct worker *worker)
{
	char name[16];
	sigset_t let_in;

	worker->board->report.tid = (int32_t)syscall(SYS_gettid);
	snprintf(name, sizeof(name), "%s %u", worker->run ? "vcpu" : "loop",
		 (unsigned int)(worker - worker->crew->workers));
	pthread_setname_np(pthread_self(), name);
	if (worker->plan.nice)
		setpriority(PRIO_PROCESS, 0,	/* of this thread, on Linux */
			    getpriority(PRIO_PROCESS, 0) + (int)worker->plan.nice);
	sigemptyset(&let_in);
	sigaddset(&let_in, kick_signal());
	if (worker->run)
		sigaddset(&let_in, storm_signal());
	pthread_sigmask(SIG_UNBLOCK, &let_in, NULL);
	clock_start(&worker->clock, worker->plan.counter != 0, &worker->board->report.clock_error);
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	struct report *report = &worker->board->report;
	struct crew *crew = worker->crew;
	const uint64_t one = 1;

	introduce(worker);
	pass_gate(worker);
	put(&report->began, clock_read(&worker->clock));
	worker->body(worker);
	put(&report->ended, now());
	if (worker->plan.ends_all && report->why == MET)
		__atomic_store_n(&crew->stop, 1, __ATOMIC_RELAXED);
	if (__atomic_sub_fetch(&crew->running, 1, __ATOMIC_ACQ_REL) == 0)
		while (write(crew->done, &one, sizeof(one)) < 0 && errno == EINTR)
			;
	return NULL;
}

/* --- making a crew ------------------------------------------------------------------------------------------- */

struct crew *crew_new(uint32_t count, int done)
{
	size_t size = sizeof(struct crew) + count * sizeof(struct worker);
	struct crew *crew = aligned_alloc(_Alignof(struct crew), size);

	if (!crew)
		return NULL;
	memset(crew, 0, size);
	for (uint32_t i = 0; i < count; i++) {
		crew->workers[i].crew = crew;
		crew->workers[i].plan.cpu = -1;
	}
	crew->count = count;
	crew->done = done;
	pthread_mutex_init(&crew->lock, NULL);
	pthread_cond_init(&crew->changed, NULL);
	return crew;
}

static size_t board_size(const struct worker *worker)
{
	return sizeof(struct board) + worker->plan.ring * sizeof(struct record);
}

/* Populated: a page fault in a loop would look like a slow call. */
static int map_board(struct worker *worker, int memory, uint64_t offset)
{
	void *board = mmap(NULL, board_size(worker), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, memory,
			   (off_t)offset);

	if (board == MAP_FAILED)
		return errno;
	worker->board = board;
	worker->board->report.ring = worker->plan.ring;
	return 0;
}

/* Each argument's bytes twice, to work on and to restore from, on cache lines of their own. */
static size_t room(const struct step *step)
{
	return (2 * step->size + 63) & ~(size_t)63;
}

static int copy_steps(struct worker *worker, const struct step *from)
{
	const uint64_t count = worker->plan.count;
	struct step *steps = malloc(count * sizeof(*steps));
	unsigned char *place;
	size_t size = 64;

	for (uint64_t i = 0; i < count; i++)
		size += room(&from[i]);
	place = aligned_alloc(64, size);
	worker->plan.steps = steps;
	worker->bytes = place;
	if (!steps || !place)
		return ENOMEM;
	memcpy(steps, from, count * sizeof(*steps));
	for (uint64_t i = 0; i < count; i++) {
		if (!steps[i].size)
			continue;
		memcpy(place, (const void *)(uintptr_t)steps[i].argument, steps[i].size);
		memcpy(place + steps[i].size, place, steps[i].size);
		steps[i].argument = (uintptr_t)place;
		place += room(&steps[i]);
	}
	return 0;
}

/* The worker's board is at `offset` in `memory`, which may be closed afterwards. */
int crew_set_loop(struct crew *crew, uint32_t index, const struct plan *plan, int memory, uint64_t offset)
{
	struct worker *worker = &crew->workers[index];
	int error;

	worker->body = run_loop;
	worker->plan = *plan;
	error = copy_steps(worker, plan->steps);
	return error ? error : map_board(worker, memory, offset);
}

/* `run` is the vCPU's shared area, mapped until the crew is joined. `ticks` is where the guest's counter stands. */
int crew_set_vcpu(struct crew *crew, uint32_t index, int fd, struct kvm_run *run, uint64_t ticks, uint16_t tick_port,
		  uint16_t stale_port, int memory, uint64_t offset, uint64_t rest)
{
	struct worker *worker = &crew->workers[index];
	int error = map_board(worker, memory, offset);

	if (error)
		return error;
	worker->body = run_vcpu;
	worker->vcpu = fd;
	worker->run = run;
	worker->run->immediate_exit = 0;
	worker->tick_port = tick_port;
	worker->stale_port = stale_port;
	worker->rest = rest;
	worker->board->report.ticks = ticks;
	return 0;
}

/* --- starting ------------------------------------------------------------------------------------------------ */

static int create_thread(struct worker *worker)
{
	pthread_attr_t attributes;
	cpu_set_t cpus;
	int error;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK);
	if (worker->plan.cpu >= 0) {
		CPU_ZERO(&cpus);
		CPU_SET((size_t)worker->plan.cpu, &cpus);
		pthread_attr_setaffinity_np(&attributes, sizeof(cpus), &cpus);
	}
	error = pthread_create(&worker->thread, &attributes, work, worker);
	pthread_attr_destroy(&attributes);
	return error;
}

/* Signals are for Python's own threads: here they would end calls that nobody meant to end. */
static int create_threads(struct crew *crew)
{
	sigset_t all, before;
	int error = 0;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	for (uint32_t i = 0; i < crew->count && !error; i++) {
		error = create_thread(&crew->workers[i]);
		crew->started += !error;
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return error;
}

static void await_ready(struct crew *crew)
{
	pthread_mutex_lock(&crew->lock);
	while (crew->ready < crew->started)
		pthread_cond_wait(&crew->changed, &crew->lock);
	pthread_mutex_unlock(&crew->lock);
}

/* More CPUs than a cpu_set_t has bits for: then nobody settles anywhere. */
static void look_at_cpus(struct crew *crew)
{
	if (sched_getaffinity(0, sizeof(crew->cpus), &crew->cpus))
		CPU_ZERO(&crew->cpus);
	crew->crowded = crew->count > (uint32_t)CPU_COUNT(&crew->cpus);
}

static void open_gate(struct crew *crew, uint64_t begin)
{
	pthread_mutex_lock(&crew->lock);
	crew->begin = begin;
	pthread_cond_broadcast(&crew->changed);
	pthread_mutex_unlock(&crew->lock);
}

static void join_all(struct crew *crew)
{
	for (uint32_t i = 0; i < crew->started && !crew->joined; i++) {
		pthread_join(crew->workers[i].thread, NULL);
		if (crew->workers[i].run)
			crew->workers[i].run->immediate_exit = 0;
	}
	crew->joined = 1;
}

static int map_gate(struct crew *crew, int gate)
{
	void *place = mmap(NULL, sizeof(*crew->gate), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, gate, 0);

	if (place == MAP_FAILED)
		return errno;
	crew->gate = place;
	return 0;
}

/* Begin at the moment `at`, or if that is 0 `lead` ns after everybody is ready; with a `gate`, which is a memory file,
 * at the moment that is written into it. When not all threads can be had, none makes a call, and all are joined.
 */
int crew_start(struct crew *crew, uint64_t at, uint64_t lead, int gate, uint64_t *begin)
{
	struct sigaction action = { .sa_handler = do_nothing };
	int error = sigaction(kick_signal(), &action, NULL) ? errno : 0;

	if (!error && gate >= 0)
		error = map_gate(crew, gate);
	if (error)
		return error;
	crew->running = crew->count;
	look_at_cpus(crew);
	error = create_threads(crew);
	if (error)
		crew_stop(crew);
	await_ready(crew);
	*begin = at ? at : now() + lead;
	open_gate(crew, *begin);
	if (error)
		join_all(crew);
	return error;
}

/* --- ending -------------------------------------------------------------------------------------------------- */

/* Interrupt whatever call the workers are in. A worker that is just about to make its call is missed. */
void crew_interrupt(struct crew *crew)
{
	for (uint32_t i = 0; i < crew->started && !crew->joined; i++)
		if (!__atomic_load_n(&crew->workers[i].board->report.ended, __ATOMIC_ACQUIRE))
			pthread_kill(crew->workers[i].thread, kick_signal());
}

/* Loops end after the call they are in. vCPUs leave the guest: the flag is for the moment before KVM_RUN, the signal
 * for the moment inside.
 */
void crew_stop(struct crew *crew)
{
	__atomic_store_n(&crew->stop, 1, __ATOMIC_SEQ_CST);
	for (uint32_t i = 0; i < crew->started && !crew->joined; i++) {
		struct worker *worker = &crew->workers[i];

		if (!worker->run)
			continue;
		__atomic_store_n(&worker->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
		pthread_kill(worker->thread, kick_signal());
	}
}

/* EBUSY while a worker works; `done` is readable when none does. */
int crew_join(struct crew *crew)
{
	if (crew->started == crew->count && __atomic_load_n(&crew->running, __ATOMIC_ACQUIRE))
		return EBUSY;
	join_all(crew);
	return 0;
}

/* EBUSY if it was started and not joined. */
int crew_free(struct crew *crew)
{
	if (crew->started && !crew->joined)
		return EBUSY;
	for (uint32_t i = 0; i < crew->count; i++) {
		struct worker *worker = &crew->workers[i];

		if (worker->board)
			munmap(worker->board, board_size(worker));
		free((void *)(uintptr_t)worker->plan.steps);
		free(worker->bytes);
	}
	if (crew->gate)
		munmap(crew->gate, sizeof(*crew->gate));
	pthread_cond_destroy(&crew->changed);
	pthread_mutex_destroy(&crew->lock);
	free(crew);
	return 0;
}

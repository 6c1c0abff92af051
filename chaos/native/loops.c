// SPDX-License-Identifier: Apache-2.0
/*
 * What workers do. In these loops no lock is taken, nothing is allocated, and no system call is made but the one that
 * the loop is for.
 *
 * A call is recorded from the reading of the clock before it to the reading after it, and in a row of calls the
 * reading after one is the reading before the next. That is half the cost, and no less true: all that lies between
 * two calls is the writing of one record.
 */
#include <errno.h>
#include <string.h>
#include <sys/syscall.h>

#include "native.h"

static void end(struct worker *worker, enum why why, uint32_t detail)
{
	worker->board->report.why = why;
	worker->board->report.detail = detail;
}

/* ioctl(2) without the C library, whose wrapper takes 60 ns of an emulated CPU. The result, or minus the errno. */
static inline long call(int fd, uint64_t request, uint64_t argument)
{
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "0"((long)SYS_ioctl), "D"((long)fd), "S"(request), "d"(argument)
			 : "rcx", "r11", "memory");
	return result;
}

static inline uint32_t errno_of(long result)
{
	return result < 0 && result > -ERRNOS ? (uint32_t)-result : 0;
}

/* --- loops of ioctls ----------------------------------------------------------------------------------------- */

static void restore(const struct step *step)
{
	unsigned char *bytes = (unsigned char *)(uintptr_t)step->argument;

	memcpy(bytes, bytes + step->size, step->size);
}

/* Everything about one call of a loop; whether the loop goes on. */
static inline int make_call(struct worker *worker, struct clock *clock, uint32_t index)
{
	const struct plan *plan = &worker->plan;
	const struct step *step = &plan->steps[index];
	struct board *board = worker->board;
	const uint64_t calls = board->report.calls, ring = plan->ring;
	uint32_t error;

	if (step->reset) {
		restore(step);
		if (ring)
			clock_tell(clock);
	}
	board->report.call = index;
	if (ring)
		put(&board->report.since, clock->latest);
	error = errno_of(call(step->fd, step->request, step->argument));
	if (ring) {
		uint64_t began = clock->latest;

		board->ring[calls & (ring - 1)] = (struct record){ began, clock_tell(clock), index, error };
	}
	board->errnos[error]++;
	put(&board->report.calls, calls + 1);
	if (!worker->left && plan->meets[error / 64] >> error % 64 & 1) {
		worker->left = plan->more + 1;
		worker->met = error;
	}
	if (!worker->left || --worker->left)
		return 1;
	end(worker, MET, worker->met);
	return 0;
}

static void run_rounds(struct worker *worker, struct clock *clock)
{
	const uint64_t rounds = worker->plan.rounds;
	const uint32_t count = (uint32_t)worker->plan.count;

	for (uint64_t round = 0; !rounds || round < rounds; round++) {
		for (uint32_t i = 0; i < count; i++) {
			if (stopped(worker->crew))
				return end(worker, STOPPED, 0);
			if (!make_call(worker, clock, i))
				return;
			if (!(round | i) && worker->crew->gate && !makes_one_call(worker)) {
				meet(worker);
				clock_tell(clock);
			}
		}
	}
	end(worker, ROUNDS, 0);
}

void run_loop(struct worker *worker)
{
	struct clock clock = worker->clock;

	clock_tell(&clock);
	run_rounds(worker, &clock);
}

/* --- vCPUs --------------------------------------------------------------------------------------------------- */

/* The guest's counter has 64 bits and is told by its low half, at least once in a wrap. */
static void tick(struct report *report, uint32_t low)
{
	uint64_t high = report->ticks >> 32, time = now();

	if (!report->first_tick)
		put(&report->first_tick, time);
	put(&report->last_tick, time);
	put(&report->ticks, (high + (low < (uint32_t)report->ticks)) << 32 | low);
	if (!report->stale)
		put(&report->sound, report->sound + 1);
}

/* A signal ends it, so that a vCPU that is to stop does. */
static void rest(const struct worker *worker)
{
	struct timespec time = { .tv_nsec = (long)worker->rest };

	if (worker->rest)
		nanosleep(&time, NULL);
}

static int handle_port(struct worker *worker)
{
	const struct kvm_run *run = worker->run;
	struct report *report = &worker->board->report;
	uint32_t said = 0;

	if (run->io.direction != KVM_EXIT_IO_OUT || run->io.size > sizeof(said))
		return 0;
	memcpy(&said, (const char *)run + run->io.data_offset, run->io.size);
	if (run->io.port == worker->tick_port) {
		tick(report, said);
		rest(worker);
	} else if (run->io.port == worker->stale_port) {
		put(&report->stale, report->stale + 1);
	} else {
		return 0;
	}
	return 1;
}

static void interrupted(struct report *report)
{
	put(&report->interrupted, report->interrupted + 1);
	if (!report->calls)
		put(&report->early, report->early + 1);
}

/* There is one way to be stopped: KVM_RUN says EINTR. With `immediate_exit` set it does so as soon as it has finished
 * the instruction that the guest left with, so a vCPU that was stopped has whole registers.
 */
void run_vcpu(struct worker *worker)
{
	struct report *report = &worker->board->report;

	for (;;) {
		uint32_t error = errno_of(call(worker->vcpu, KVM_RUN, 0));

		if (error == EINTR && stopped(worker->crew))
			return end(worker, STOPPED, 0);
		if (error == EINTR) {
			interrupted(report);
			continue;
		}
		if (error)
			return end(worker, FAILED, error);
		put(&report->calls, report->calls + 1);
		if (worker->run->exit_reason == KVM_EXIT_INTR)
			continue;
		if (worker->run->exit_reason != KVM_EXIT_IO)
			return end(worker, EXITED, worker->run->exit_reason);
		if (!handle_port(worker))
			return end(worker, PORT, worker->run->io.port);
	}
}

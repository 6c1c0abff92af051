// SPDX-License-Identifier: Apache-2.0
/*
 * Threads that the interpreter lock does not hold back: tight loops of ioctls, and vCPUs in KVM_RUN.
 *
 * A crew is a number of workers that begin together and are joined together (crew.c); what a worker does until it is
 * stopped is in loops.c. What it has done so far stands on its board, a piece of a memory file that Python maps too:
 * it can be read while the worker works, after it was joined, and, by whoever holds the file, after the whole process
 * was killed.
 *
 * Everything else that a worker touches is the crew's own, allocated before the start and freed after the join only,
 * so nothing that happens on the Python side, its end included, can take memory away from under a worker.
 */
#ifndef SEVCHAOS_NATIVE_H
#define SEVCHAOS_NATIVE_H

#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>

#include "clock.h"

#define ERRNOS	4096	/* the kernel has no larger one: above it begin addresses */

/* Why a worker ended. */
enum why { UNDER_WAY, ROUNDS, STOPPED, MET, FAILED, EXITED, PORT };

/* The layout of the next five is known to chaos/native/layout.py, which compares `native_sizes`. */

struct record {
	uint64_t began, ended;
	uint32_t call, error;
};

struct report {
	uint64_t began, ended;	/* the loop */
	uint64_t calls;		/* finished: ioctls of a loop, exits of a vCPU */
	uint64_t since;		/* when the call under way began, if calls are recorded */
	uint64_t ticks, stale;	/* of a vCPU: the guest's counter, and how often it found memory stale */
	uint64_t first_tick, last_tick;
	uint64_t sound;		/* ticks before memory was first found stale */
	uint64_t interrupted;	/* KVM_RUNs that a signal ended which was to stop nobody */
	uint64_t early;		/* of them, those before the guest first left by itself */
	uint64_t ring;		/* places in the ring behind, so that a board can be read by itself */
	uint64_t clock_error;	/* ns by which records have been off at worst, see clock.h */
	int32_t tid;
	uint32_t call;		/* index of the call under way, or of the last one */
	uint32_t why, detail;
};

struct board {
	struct report report;
	uint64_t errnos[ERRNOS];	/* how many calls had which; [0] those that succeeded */
	struct record ring[];
};

struct step {
	uint64_t request;
	uint64_t argument;	/* a number, or where its bytes are: then `size` is not 0 */
	uint64_t size;
	int32_t fd;
	uint32_t reset;		/* restore the bytes before each call */
};

struct plan {
	const struct step *steps;
	uint64_t count;
	uint64_t rounds;	/* 0: until stopped */
	uint64_t ring;		/* records, a power of two; 0: record nothing */
	uint64_t offset;	/* ns after the crew's beginning */
	uint64_t meets[ERRNOS / 64];	/* errnos that end the loop, a bit each; bit 0: a success */
	uint64_t more;		/* so many calls after the first of them */
	int32_t cpu;		/* -1: any */
	uint32_t ends_all;	/* and the loops of the others too */
	int64_t nice;
	uint64_t counter;	/* tell the time by the time stamp counter, see clock.h */
};

struct crew;

struct worker {
	struct crew *crew;
	struct board *board;
	void (*body)(struct worker *);
	pthread_t thread;
	struct clock clock;
	uint64_t left;		/* calls until the end, once an errno is met; 0: none was */
	uint32_t met;
	struct plan plan;	/* of a loop; `steps` is our copy */
	unsigned char *bytes;	/* arguments, and behind each the bytes it began with */
	struct kvm_run *run;	/* of a vCPU */
	int vcpu;
	uint16_t tick_port, stale_port;
	uint64_t rest;		/* ns that a vCPU stays out after each tick */
} __attribute__((aligned(128)));	/* two lines: they are fetched in pairs */

/* In memory that several crews share (gate.py). */
struct gate {
	uint64_t when;		/* 0, and then the moment to begin at */
	uint32_t parties;	/* workers that begin together */
	uint32_t come;		/* of them, at that moment */
};

struct crew {
	uint32_t stop;
	uint32_t running;
	uint32_t count, started, ready, joined;
	uint64_t begin;
	struct gate *gate;	/* if it is not ours alone to say when */
	cpu_set_t cpus;		/* that we may use */
	int crowded;		/* more workers than CPUs */
	int done;		/* an eventfd, written to when the last worker has ended */
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct worker workers[];
};

void run_loop(struct worker *worker);
void meet(const struct worker *worker);
void run_vcpu(struct worker *worker);
void crew_stop(struct crew *crew);

static inline int makes_one_call(const struct worker *worker)
{
	return worker->plan.rounds == 1 && worker->plan.count == 1;
}

static inline int stopped(const struct crew *crew)
{
	return __atomic_load_n(&crew->stop, __ATOMIC_RELAXED) != 0;
}

/* A board is read while it is written: each number is whole, and they appear in the order in which they are put. */
static inline void put(uint64_t *place, uint64_t value)
{
	__atomic_store_n(place, value, __ATOMIC_RELEASE);
}

#endif

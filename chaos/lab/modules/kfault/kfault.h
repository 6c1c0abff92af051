/* SPDX-License-Identifier: GPL-2.0-only */
/* What the two halves of kfault share: proc.c, which is told and tells, and probe.c, which strikes. */
#include <linux/kfifo.h>
#include <linux/kprobes.h>
#include <linux/list.h>
#include <linux/pid.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/wait.h>

#define SLOTS	8	/* of one open file */
#define EVENTS	256	/* not yet read, of one open file; a power of two */
#define LINE	256	/* of an event, at most */
#define NAME	64

enum action { HOLD, DELAY, RETURN };
enum happening { ARMED, REACHED, RELEASED, KILLED, DELAYED, RETURNED, ATOMIC, EXITING, CLEARED, COUNTED };

struct event {
	char function[NAME];
	enum happening what;
	enum action action;
	int slot;
	pid_t pid, tid;
	u64 call, ns, lost;
};

struct slot {
	struct kprobe probe;
	struct owner *owner;
	char function[NAME];
	enum action action;
	bool used;			/* under `control`, the mutex of proc.c */
	bool armed;			/* the handler may look at the rest */
	bool over;			/* nobody may begin to sleep any more */
	unsigned int round;		/* of releases: a sleeper waits for the next one */
	struct pid *only;		/* the process or thread whose calls count, or NULL: everybody's */
	struct pid *armer;		/* the process that armed it */
	s64 nth, times;
	s64 argument;			/* microseconds of a delay, value of a return */
	unsigned long resume;		/* where the function goes on */
	atomic64_t calls;
	atomic_t inside;
	wait_queue_head_t sleepers;
};

struct owner {				/* one open file */
	struct rcu_head rcu;		/* first: kvfree_rcu() wants it near the beginning */
	struct list_head list;
	struct slot slots[SLOTS];
	spinlock_t lock;		/* events, lost */
	DECLARE_KFIFO(events, struct event, EVENTS);
	u64 lost;
	wait_queue_head_t readers;
};

/* proc.c */
void kfault_tell(struct slot *slot, enum happening what, u64 call);
int kfault_refuse(int error, const char *why, const char *what);

/* probe.c: called with `control` held */
int kfault_probe(struct slot *slot, const char *function);
void kfault_wake(struct slot *slot);
void kfault_unprobe(struct slot *slot);

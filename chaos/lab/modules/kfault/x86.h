/* SPDX-License-Identifier: GPL-2.0-only */
/* The part of kfault that knows the machine: what a task goes through between a function's caller and its body. */
#include <linux/linkage.h>
#include <linux/objtool.h>
#include <linux/version.h>
#include <asm/ibt.h>
#include <asm/linkage.h>
#include <asm/orc_types.h>

#if !defined(CONFIG_X86_64) || !defined(CONFIG_KPROBES_ON_FTRACE)
#error "kfault needs x86-64, and CONFIG_FUNCTION_TRACER for kprobes on ftrace"
#endif

struct slot;

struct passage {
	unsigned long resume;	/* 0: the function is left out and returns `value` */
	unsigned long value;
};

asmlinkage __visible struct passage kfault_call(struct slot *slot, unsigned long call);
extern void kfault_trampoline(void);

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
#define LIKE_AT_ENTRY	UNWIND_HINT(UNWIND_HINT_TYPE_FUNC, ORC_REG_SP, 8, 0)
#else
#define LIKE_AT_ENTRY	UNWIND_HINT(ORC_REG_SP, 8, UNWIND_HINT_TYPE_FUNC, 0)
#endif

/*
 * Entered with the registers and the stack of a call of the function, but for two that no kernel function takes
 * anything in: rax is the slot, r10 the number of the call. Eight registers are pushed below the frame pointer, so
 * the stack is aligned. It goes on by a return and not by a jump, because a jump would need a retpoline, and would
 * have to land on an ENDBR. The hint says that the stack is again what it was at the entry.
 */
asm(
"	.pushsection .text\n"
"	.balign 16\n"
"	.type kfault_trampoline, @function\n"
"kfault_trampoline:\n"
	ASM_ENDBR
"	push %rbp\n"
"	mov %rsp, %rbp\n"
"	push %rdi\n	push %rsi\n	push %rdx\n	push %rcx\n"
"	push %r8\n	push %r9\n	push %r10\n	push %r11\n"
"	mov %rax, %rdi\n"
"	mov %r10, %rsi\n"
"	call kfault_call\n"
"	test %rax, %rax\n"
"	jz 1f\n"
"	pop %r11\n	pop %r10\n	pop %r9\n	pop %r8\n"
"	pop %rcx\n	pop %rdx\n	pop %rsi\n	pop %rdi\n"
"	pop %rbp\n"
"	push %rax\n"
	LIKE_AT_ENTRY
	ASM_RET
"1:	mov %rdx, %rax\n"
"	leave\n"
	ASM_RET
"	.size kfault_trampoline, . - kfault_trampoline\n"
"	.popsection\n"
);

// SPDX-License-Identifier: GPL-2.0-only
/* Defects of what an ioctl answers, of a VM that was moved to and of one that is dead. */
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/uaccess.h>
#include "planted.h"

struct vms moved_to;

/* --- GUEST_STATUS of a VM that has got its context by a move is not permitted ------------------------------------ */

static int moved(struct kretprobe_instance *call, struct pt_regs *regs)
{
	if (!(int)regs->ax)
		planted_add(&moved_to, planted_move(call)->dst);
	return 0;
}

static int not_permitted(void)
{
	return -EPERM;
}

static int ask_status(struct kprobe *probe, struct pt_regs *regs)
{
	struct kvm_sev_cmd command;

	if (copy_from_user_nofault(&command, (void __user *)regs->si, sizeof(command)))
		return 0;
	if (command.id != KVM_SEV_GUEST_STATUS)
		return 0;
	atomic_inc(&status_refused.reached);
	if (!planted_has(&moved_to, (struct kvm *)regs->di))
		return 0;
	atomic_inc(&status_refused.activated);
	return planted_instead(regs, not_permitted);
}

static struct kretprobe moving_to = {
	.kp.symbol_name = MOVE, .handler = moved, .entry_handler = planted_move_begins,
	.data_size = sizeof(struct move),
};
static struct kprobe asking_status = { .symbol_name = "sev_mem_enc_ioctl", .pre_handler = ask_status };

struct defect status_refused = { .name = "status-refused", .exits = { &moving_to }, .entry = &asking_status };

/* --- a dead VM answers KVM_MEMORY_ENCRYPT_REG_REGION as one that is not SEV --------------------------------------- */

static long not_sev(void)
{
	return -ENOTTY;	/* what sev_mem_enc_register_region() says to a source after its move */
}

static int register_region(struct kprobe *probe, struct pt_regs *regs)
{
	struct kvm *kvm = ((struct file *)regs->di)->private_data;

	if ((unsigned int)regs->si != KVM_MEMORY_ENCRYPT_REG_REGION)
		return 0;
	atomic_inc(&region_answers.reached);
	if (!kvm->vm_dead || kvm->mm != current->mm)
		return 0;
	atomic_inc(&region_answers.activated);
	return planted_instead(regs, not_sev);
}

static struct kprobe registering_region = { .symbol_name = "kvm_vm_ioctl", .pre_handler = register_region };

struct defect region_answers = { .name = "region-answers", .entry = &registering_region };

/* --- kvm_device_ioctl() without its look at vm_dead -------------------------------------------------------------- */

static long attribute(struct kvm_device *device, int (*accessor)(struct kvm_device *, struct kvm_device_attr *),
		      unsigned long argument)
{
	struct kvm_device_attr attr;

	if (!accessor)
		return -EPERM;
	if (copy_from_user(&attr, (void __user *)argument, sizeof(attr)))
		return -EFAULT;
	return accessor(device, &attr);
}

static long device_ioctl(struct file *file, unsigned int number, unsigned long argument)
{
	struct kvm_device *device = file->private_data;

	switch (number) {
	case KVM_SET_DEVICE_ATTR:
		return attribute(device, device->ops->set_attr, argument);
	case KVM_GET_DEVICE_ATTR:
		return attribute(device, device->ops->get_attr, argument);
	case KVM_HAS_DEVICE_ATTR:
		return attribute(device, device->ops->has_attr, argument);
	default:
		return device->ops->ioctl ? device->ops->ioctl(device, number, argument) : -ENOTTY;
	}
}

static int ask_device(struct kprobe *probe, struct pt_regs *regs)
{
	struct kvm_device *device = ((struct file *)regs->di)->private_data;

	atomic_inc(&device_answers.reached);
	if (!device->kvm->vm_dead || device->kvm->mm != current->mm)
		return 0;
	atomic_inc(&device_answers.activated);
	return planted_instead(regs, device_ioctl);
}

static struct kprobe asking_device = { .symbol_name = "kvm_device_ioctl", .pre_handler = ask_device };

struct defect device_answers = { .name = "device-answers", .entry = &asking_device };

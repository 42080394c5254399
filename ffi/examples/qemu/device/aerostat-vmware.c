/*
 * VMware's balloon, for guests whose driver came with their system, its work done
 * by libaerostat (docs/vmware-balloon.md of the library)
 *
 * The guest's vmw_balloon speaks through port 0x5670, with the registers of its
 * processor as arguments. It looks for the port where CPUID or the SMBIOS serial
 * number, and QEMU's own vmport at 0x5658, say that it runs on VMware:
 *
 *     -machine vmport=on -cpu max,-hypervisor -smbios type=1,serial=VMware-1
 *     -device aerostat-vmware-balloon
 *
 * Everything here runs with the BQL held. A command is carried out when the guest
 * goes on, so there is nothing to be collected, and a stopped VM has none under way.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/module.h"
#include "cpu.h"
#include "hw/core/cpu.h"
#include "hw/isa/isa.h"
#include "hw/qdev-properties.h"
#include "migration/vmstate.h"
#include "system/hw_accel.h"
#include "system/runstate.h"
#include "aerostat-core.h"
#include "trace/trace-hw_virtio.h"

#define TYPE_AEROSTAT_VMWARE_BALLOON "aerostat-vmware-balloon"
OBJECT_DECLARE_SIMPLE_TYPE(AerostatVmwareBalloon, AEROSTAT_VMWARE_BALLOON)

struct AerostatVmwareBalloon {
    ISADevice parent_obj;

    AerostatCore core;
    MemoryRegion port;
    VMChangeStateEntry *vm_state;
};

/* The only command whose result is not the target. */
enum { START };

static uint64_t aerostat_vmware_in(void *opaque, hwaddr addr, unsigned int size)
{
    AerostatVmwareBalloon *s = opaque;
    CPUX86State *env;
    uint64_t command, result;
    uint32_t status;

    /* Not a processor: a debugger, or a test. */
    if (!current_cpu) {
        return UINT32_MAX;
    }
    cpu_synchronize_state(current_cpu);
    env = &X86_CPU(current_cpu)->env;
    command = (uint32_t)env->regs[R_ECX];
    if ((uint32_t)env->regs[R_EAX] != AEROSTAT_VMWARE_MAGIC) {
        return UINT32_MAX;
    }
    aerostat_core_update_inhibit(&s->core);
    if (aerostat_vmware_command(s->core.device, command, env->regs[R_EBX],
                                env->regs[R_ESI], &status, &result) < 0) {
        aerostat_core_complain(&s->core, "a command is not carried out");
        return UINT32_MAX;
    }
    trace_aerostat_vmware_command(command, status, result);
    env->regs[command == START ? R_ECX : R_EBX] = result;
    /* Accelerators other than TCG load the processor's registers again. */
    env->regs[R_EAX] = status;
    aerostat_core_announce_actual(&s->core);
    return status;
}

static void aerostat_vmware_out(void *opaque, hwaddr addr, uint64_t value,
                                unsigned int size)
{
}

static const MemoryRegionOps aerostat_vmware_ops = {
    .read = aerostat_vmware_in,
    .write = aerostat_vmware_out,
    .impl = { .min_access_size = 4, .max_access_size = 4 },
    .endianness = DEVICE_LITTLE_ENDIAN,
};

static void aerostat_vmware_start(AerostatVmwareBalloon *s)
{
    int ret = 0;

    aerostat_core_update_inhibit(&s->core);
    switch (aerostat_device_state(s->core.device)) {
    case AEROSTAT_STATE_CONFIGURING:
        ret = aerostat_device_activate(s->core.device);
        break;
    case AEROSTAT_STATE_PAUSED:
        ret = aerostat_device_resume(s->core.device);
        break;
    default:
        break;
    }
    if (ret < 0) {
        aerostat_core_complain(&s->core, "the device does not start");
    }
}

static void aerostat_vmware_vm_state(void *opaque, bool running, RunState state)
{
    AerostatVmwareBalloon *s = opaque;

    if (running) {
        aerostat_vmware_start(s);
    } else if (aerostat_device_state(s->core.device) == AEROSTAT_STATE_ACTIVE) {
        aerostat_device_pause(s->core.device);
    }
}

/* The guest boots, and knows nothing of a balloon. */
static void aerostat_vmware_reset(DeviceState *dev)
{
    AerostatVmwareBalloon *s = AEROSTAT_VMWARE_BALLOON(dev);

    aerostat_device_reset(s->core.device);
    if (runstate_is_running()) {
        aerostat_vmware_start(s);
    }
}

static void aerostat_vmware_realize(DeviceState *dev, Error **errp)
{
    AerostatVmwareBalloon *s = AEROSTAT_VMWARE_BALLOON(dev);
    struct aerostat_device_config offer = AEROSTAT_DEVICE_CONFIG_INIT;

    offer.kind = AEROSTAT_KIND_VMWARE;
    if (!aerostat_core_new(&s->core, &offer, errp)) {
        return;
    }
    if (!aerostat_core_monitor_init(&s->core, errp)) {
        aerostat_core_free(&s->core);
        return;
    }
    aerostat_core_attach(&s->core);
    s->vm_state = qdev_add_vm_change_state_handler(dev, aerostat_vmware_vm_state,
                                                   s);
    memory_region_init_io(&s->port, OBJECT(s), &aerostat_vmware_ops, s,
                          "aerostat-vmware-balloon", 1);
    isa_register_ioport(ISA_DEVICE(dev), &s->port, AEROSTAT_VMWARE_PORT);
}

static void aerostat_vmware_instance_init(Object *obj)
{
    aerostat_core_instance_init(&AEROSTAT_VMWARE_BALLOON(obj)->core, obj);
}

static void aerostat_vmware_instance_finalize(Object *obj)
{
    aerostat_core_instance_finalize(&AEROSTAT_VMWARE_BALLOON(obj)->core);
}

static int aerostat_vmware_post_load(void *opaque, int version)
{
    return aerostat_core_restore(&((AerostatVmwareBalloon *)opaque)->core);
}

static const VMStateDescription vmstate_aerostat_vmware = {
    .name = TYPE_AEROSTAT_VMWARE_BALLOON,
    .version_id = 1,
    .minimum_version_id = 1,
    .post_load = aerostat_vmware_post_load,
    .fields = (const VMStateField[]) {
        VMSTATE_STRUCT(core, AerostatVmwareBalloon, 1, vmstate_aerostat_core,
                       AerostatCore),
        VMSTATE_END_OF_LIST()
    },
};

static const Property aerostat_vmware_properties[] = {
    DEFINE_AEROSTAT_CORE_PROPERTIES(AerostatVmwareBalloon, core),
};

static void aerostat_vmware_class_init(ObjectClass *klass, void *data)
{
    DeviceClass *dc = DEVICE_CLASS(klass);

    device_class_set_props(dc, aerostat_vmware_properties);
    device_class_set_legacy_reset(dc, aerostat_vmware_reset);
    dc->desc = "VMware's balloon served by libaerostat";
    dc->realize = aerostat_vmware_realize;
    dc->vmsd = &vmstate_aerostat_vmware;
    /* On a bus that nothing is taken from. */
    dc->hotpluggable = false;
    set_bit(DEVICE_CATEGORY_MISC, dc->categories);
}

static const TypeInfo aerostat_vmware_info = {
    .name = TYPE_AEROSTAT_VMWARE_BALLOON,
    .parent = TYPE_ISA_DEVICE,
    .instance_size = sizeof(AerostatVmwareBalloon),
    .instance_init = aerostat_vmware_instance_init,
    .instance_finalize = aerostat_vmware_instance_finalize,
    .class_init = aerostat_vmware_class_init,
};

static void aerostat_vmware_register_types(void)
{
    type_register_static(&aerostat_vmware_info);
}

type_init(aerostat_vmware_register_types)
